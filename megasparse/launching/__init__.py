"""How a process comes into a run and leaves it: launcher, process group, lost peers, watchdog, SLURM submission."""

from megasparse.launching.environment import (
    LaunchEnvironment,
    choose_accelerator,
    leave_warnings_to_rank_0,
    use_huge_pages,
)
from megasparse.launching.process_group import open_mesh

__all__ = ["LaunchEnvironment", "choose_accelerator", "leave_warnings_to_rank_0", "open_mesh", "use_huge_pages"]
