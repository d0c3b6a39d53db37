"""How a process comes into a run and leaves it: launcher, process group, lost peers, watchdog, SLURM submission."""

from megasparse.launching.environment import LaunchEnvironment, choose_accelerator, leave_warnings_to_rank_0
from megasparse.launching.host_memory import keep_host_memory
from megasparse.launching.process_group import open_mesh

__all__ = ["LaunchEnvironment", "choose_accelerator", "keep_host_memory", "leave_warnings_to_rank_0", "open_mesh"]
