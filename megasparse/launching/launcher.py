"""The launchers above this process: once one of them has gone, nobody is left who would end or restart the run.

    launchers = find_launchers()         # early, while they live
    if gone := launchers.gone():         # "deepspeed (process 4711)"

The ranks of a launcher that was killed would go on without it, for days perhaps, and hold what the next start needs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import PurePath

import psutil

NAMES = frozenset(
    "deepspeed deepspeed.launcher.launch deepspeed.launcher.runner torchrun torch.distributed.run "
    "torch.distributed.launch mpirun mpiexec mpiexec.hydra orterun orted prterun prted hydra_pmi_proxy srun "
    "slurmstepd".split()
)
"""Programs, or modules after `-m`, that start ranks."""


class Launchers:
    """The processes above this one, up to the outermost that is known to start ranks."""

    def __init__(self, processes: Sequence[psutil.Process], names: Sequence[str]) -> None:
        self._named = list(zip(processes, names, strict=True))

    def gone(self) -> str | None:
        """One that has ended; None while all of them run, and for a process that nobody launched."""
        for process, name in self._named:
            # Also tells a process apart from a later one of the same number.
            if not process.is_running() or _status(process) == psutil.STATUS_ZOMBIE:
                return f"{name} (process {process.pid})"
        return None


def find_launchers() -> Launchers:
    """Those of this process. Shells between them, as scripts of batch systems, count; what is further out does not."""
    processes = psutil.Process().parents()
    names = [_name(process) for process in processes]
    known = [number for number, name in enumerate(names) if name in NAMES]
    count = known[-1] + 1 if known else 0
    return Launchers(processes[:count], names[:count])


def _name(process: psutil.Process) -> str:
    """Of program or module: `deepspeed`, `torch.distributed.run`; empty where it cannot be read."""
    with contextlib.suppress(psutil.Error, OSError):
        words = process.cmdline()
        program = PurePath(words[0]).name.rstrip(":") if words else process.name()
        if not program.startswith("python"):
            # slurmstepd writes its job into its command line.
            return program.split(" ")[0].rstrip(":")
        if "-m" in words[1:-1]:
            return words[words.index("-m") + 1]
        script = next((word for word in words[1:] if not word.startswith("-")), program)
        return PurePath(script).name
    return ""


def _status(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status()
    return psutil.STATUS_ZOMBIE
