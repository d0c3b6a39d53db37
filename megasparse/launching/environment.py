"""Who this process is, from what its launcher put into the environment.

    environment = LaunchEnvironment.from_variables(os.environ)
    environment.export(os.environ, "n1", 29500)      # for torch and DeepSpeed, once the ranks know where they meet

Knows ``deepspeed`` and ``torchrun``, ``mpirun`` of Open MPI, MPICH and Intel MPI, and ``srun``, in this order: what the
inner launcher says wins. A process that nobody launched is a run of one, also inside a SLURM allocation.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Launcher:
    """The variables in which a launcher says who a process is."""

    name: str
    rank: str
    local_rank: str
    world_size: str
    signs: tuple[str, ...]
    """One of these in the environment: the launcher was at work, and the three above must be there."""


TORCH = Launcher("deepspeed or torchrun", "RANK", "LOCAL_RANK", "WORLD_SIZE", ("RANK",))
OPEN_MPI = Launcher(
    "mpirun (Open MPI)",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_SIZE",
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
)
MPICH = Launcher("mpirun (MPICH, Intel MPI)", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("PMI_RANK", "PMI_SIZE"))
# A batch script has SLURM_PROCID, SLURM_LOCALID and SLURM_NTASKS too: only the number of tasks of a step tells of srun.
SRUN = Launcher("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", ("SLURM_STEP_NUM_TASKS",))


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher said of this process."""

    rank: int
    local_rank: int
    world_size: int
    master_address: str | None = None
    """Host of rank 0; None: nobody has said, the ranks find out when they meet."""
    master_port: int | None = None

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> LaunchEnvironment:
        """From the variables of the innermost launcher; without any, one process.

        Raises ValueError, naming variable, value and what is allowed, where they are not numbers, where some are
        missing, or where they contradict each other.
        """
        launchers = _launchers(variables)
        launcher = launchers[0] if launchers else None
        rank, local_rank, world_size = _identity(variables, launcher) if launcher else (0, 0, 1)
        if launcher != TORCH:
            _refuse_leftovers(variables, local_rank, world_size)
        else:
            for outer in launchers[1:]:
                _refuse_contradiction(variables, local_rank, world_size, outer)
        return cls(rank, local_rank, world_size, *_master(variables, launcher, world_size))

    def export(self, variables: MutableMapping[str, str], address: str, port: int | None) -> None:
        """Write the variables that torch and DeepSpeed read; address, port: where rank 0 is met."""
        variables.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=address,
        )
        if port is not None:
            variables["MASTER_PORT"] = str(port)


def choose_accelerator(variables: MutableMapping[str, str]) -> str:
    """`cuda` or `cpu`, the choice of the user (DS_ACCELERATOR) before that of the machine.

    Writes it down for DeepSpeed, which looks when it is imported and otherwise warns that it had to guess.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return variables.setdefault("DS_ACCELERATOR", found)


def leave_warnings_to_rank_0(rank: int) -> None:
    """Silence the warnings of other ranks, which read the same files and settings and would tell the same.

    Python's `-W` and `PYTHONWARNINGS` win.
    """
    if rank > 0 and not sys.warnoptions:
        warnings.simplefilter("ignore", UserWarning)


def _launchers(variables: Mapping[str, str]) -> list[Launcher]:
    """Those that were at work, the innermost first."""
    found = [one for one in (TORCH, OPEN_MPI, MPICH, SRUN) if any(sign in variables for sign in one.signs)]
    if MPICH in found and SRUN in found and MPICH.local_rank not in variables:
        # `srun --mpi=pmi2` speaks to an MPI library in its variables. It is still srun.
        found.remove(MPICH)
    return found


def _identity(variables: Mapping[str, str], launcher: Launcher) -> tuple[int, int, int]:
    """Rank, local rank and world size."""
    names = (launcher.rank, launcher.local_rank, launcher.world_size)
    for name in names:
        if name not in variables:
            raise ValueError(
                f"{name}: not in the environment, though {launcher.signs[0]} or a like one is; "
                f"{launcher.name} sets {', '.join(names)}: set all of them or none"
            )
    rank, local_rank, world_size = (_number(variables, name) for name in names)
    if world_size < 1:
        raise ValueError(f"{launcher.world_size}: {world_size} in the environment; must be 1 or more")
    for name, value in ((launcher.rank, rank), (launcher.local_rank, local_rank)):
        if value >= world_size:
            raise ValueError(f"{name}: {value} must be below {launcher.world_size} {world_size}")
    return rank, local_rank, world_size


def _refuse_leftovers(variables: Mapping[str, str], local_rank: int, world_size: int) -> None:
    """LOCAL_RANK and WORLD_SIZE without a RANK must say what the launcher says."""
    for name, value in ((TORCH.local_rank, local_rank), (TORCH.world_size, world_size)):
        if name in variables and _number(variables, name) != value:
            raise ValueError(
                f"{name}: {variables[name]} in the environment without a RANK, but it can only be {value} here; "
                "set RANK, LOCAL_RANK and WORLD_SIZE, or none of them"
            )


def _refuse_contradiction(variables: Mapping[str, str], local_rank: int, world_size: int, outer: Launcher) -> None:
    """torchrun or deepspeed below another launcher is allowed, such as torchrun under srun; not all of it makes
    sense."""
    _, outer_local_rank, outer_size = _identity(variables, outer)
    if world_size < outer_size:
        # Variables left over from elsewhere: every process would take itself for the same few ranks.
        raise ValueError(
            f"{TORCH.world_size}: {world_size} in the environment, but {outer.name} has started {outer_size} processes "
            f"({outer.world_size}); unset RANK, LOCAL_RANK and WORLD_SIZE, or start independent runs apart"
        )
    if outer == OPEN_MPI and local_rank != outer_local_rank:
        raise ValueError(
            f"{TORCH.local_rank}: {local_rank} in the environment, but {OPEN_MPI.local_rank} is {outer_local_rank}; "
            f"DeepSpeed accepts only equal ones: start with mpirun or with {TORCH.name}, not with both"
        )


def _master(variables: Mapping[str, str], launcher: Launcher | None, world_size: int) -> tuple[str | None, int | None]:
    """Address and port of rank 0: MASTER_ADDR and MASTER_PORT before what the launcher tells. None: nobody says."""
    address = variables.get("MASTER_ADDR") or None
    port = _number(variables, "MASTER_PORT") if variables.get("MASTER_PORT") else None
    if port is not None and not 1 <= port <= 65535:
        raise ValueError(f"MASTER_PORT: {port} in the environment; must be 1 to 65535")
    if launcher == TORCH and world_size > 1 and (address is None or port is None):
        raise ValueError(
            f"{'MASTER_PORT' if address else 'MASTER_ADDR'}: not in the environment, though WORLD_SIZE is "
            f"{world_size}; must be address and a free port of the host of rank 0, the same on all ranks"
        )
    if launcher == SRUN and world_size > 1:
        return address or _slurm_master(variables), port or _slurm_port(variables)
    return address, port


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables[name]
    if not text.isdecimal():
        raise ValueError(f"{name}: {text!r} in the environment is not a whole number")
    return int(text)


def _slurm_master(variables: Mapping[str, str]) -> str:
    """The first host of the step: srun puts rank 0 there."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if variables.get(name):
            try:
                hosts = expand_hosts(variables[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            return hosts[0] if len(hosts) > 1 else LOOPBACK
    raise ValueError("SLURM_STEP_NODELIST: not in the environment of srun; set MASTER_ADDR to the host of rank 0")


def _slurm_port(variables: Mapping[str, str]) -> int:
    """A port that all ranks of a step agree on without talking, and other steps on the same host hardly share.

    Below the ports that Linux gives to outgoing connections (from 32768).
    """
    job, step = (_number(variables, name) if name in variables else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20000 + (job * 101 + step) % 12000


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: `n[01-03,07],m5` is n01, n02, n03, n07, m5. ValueError where it is none."""
    entries = re.findall(r"(?:[^\[\],\s]|\[[^\[\]\s]*\])+", nodelist)
    if not entries or ",".join(entries) != nodelist:
        raise ValueError(f"{nodelist!r} is no list of hosts; it must look like n[01-03,07],m5")
    return [host for entry in entries for host in _expand_entry(entry)]


def _expand_entry(entry: str) -> list[str]:
    """`r[1-2]n[01,07]` is r1n01, r1n07, r2n01, r2n07."""
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", entry)
    if match is None:
        return [entry]
    start, numbers, rest = match.groups()
    tails, hosts = _expand_entry(rest), []
    for part in numbers.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (bounds[1], bounds[2] or bounds[1]) if bounds else ("1", "0")
        if int(first) > int(last):
            raise ValueError(f"{part!r} in {entry!r} is no range of numbers; it must look like n[01-03,07]")
        texts = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        hosts += [start + text + tail for text in texts for tail in tails]
    return hosts
