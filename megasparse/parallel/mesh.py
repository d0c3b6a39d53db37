"""The mesh of processes: who this rank is, and with whom it shares what.

    environment = LaunchEnvironment.from_variables(os.environ)
    with open_mesh(environment, timeout_seconds=1800) as mesh:
        mesh.sum_(tensor)

Nothing here is global: the mesh is passed in.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LaunchEnvironment:
    """What the launcher said of this process."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_variables(cls, variables: Mapping[str, str]) -> LaunchEnvironment:
        """From RANK, LOCAL_RANK and WORLD_SIZE, as ``deepspeed`` and ``torchrun`` set them; without them one process.

        Raises ValueError where they are not numbers or contradict each other.
        """
        values = {}
        for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
            text = variables.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(f"{name}: {text!r} in the environment is not a whole number")
            values[name] = int(text)
        if values["RANK"] >= values["WORLD_SIZE"]:
            raise ValueError(f"RANK: {values['RANK']} must be below WORLD_SIZE {values['WORLD_SIZE']}")
        return cls(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"])


@dataclass(frozen=True)
class Mesh:
    """Data-parallel ranks, each with the whole model."""

    rank: int
    world_size: int
    device: torch.device
    data_parallel_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    """The same ranks over gloo, for decisions on the host: asking them never waits for the device."""

    @property
    def data_parallel_size(self) -> int:
        return self.world_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over the data-parallel ranks, in place."""
        if self.data_parallel_size > 1:
            dist.all_reduce(tensor, group=self.data_parallel_group)
        return tensor

    def agree_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank must call it and gets the same answer."""
        votes = torch.tensor(int(flag))
        if self.world_size > 1:
            dist.all_reduce(votes, group=self.control_group)
        return bool(votes)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree_any(False)

    def gather_rows(self, row: Tensor) -> Tensor:
        """Stack the equally long 1-D host tensors of all ranks: [world_size, n]."""
        rows = torch.zeros(self.world_size, row.numel(), dtype=row.dtype)
        rows[self.rank] = row
        if self.world_size > 1:
            dist.all_reduce(rows, group=self.control_group)
        return rows


@contextlib.contextmanager
def open_mesh(environment: LaunchEnvironment, timeout_seconds: int) -> Iterator[Mesh]:
    """Start the process group and hand out the mesh; the group ends with the block.

    timeout_seconds: a collective that waits longer fails.
    """
    device, backend = _device(environment.local_rank)
    _fill_rendezvous(environment)
    dist.init_process_group(
        backend, rank=environment.rank, world_size=environment.world_size, timeout=timedelta(seconds=timeout_seconds)
    )
    world = dist.group.WORLD
    assert world is not None
    control = world if backend == "gloo" else dist.new_group(backend="gloo")
    try:
        yield Mesh(environment.rank, environment.world_size, device, world, control)
    finally:
        # After a failed collective a destroy would wait for peers that are gone: leaving is enough then.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def choose_accelerator(variables: MutableMapping[str, str]) -> str:
    """`cuda` or `cpu`, the choice of the user (DS_ACCELERATOR) before that of the machine.

    Writes it down for DeepSpeed, which looks when it is imported and otherwise warns that it had to guess.
    """
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return variables.setdefault("DS_ACCELERATOR", found)


def _device(local_rank: int) -> tuple[torch.device, str]:
    if choose_accelerator(os.environ) == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank), "nccl"
    return torch.device("cpu"), "gloo"


def _fill_rendezvous(environment: LaunchEnvironment) -> None:
    """A process that no launcher started meets itself at a free port."""
    if environment.world_size == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", environment.rank), ("LOCAL_RANK", environment.local_rank)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("WORLD_SIZE", str(environment.world_size))
