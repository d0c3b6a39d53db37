"""Simulated ranks: threads that meet at a barrier to exchange tensors, as collectives do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Meeting:
    """A group of threads that call the same collectives in the same order."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=300)

    def exchange(self, rank: int, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, stacked."""
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        assert len({(slot.shape, slot.dtype) for slot in self.slots}) == 1, "ranks exchange different tensors"
        together = torch.stack(self.slots)
        self.barrier.wait()
        return together


@dataclass(frozen=True)
class SimulatedRanks:
    """What ``megasparse.parallel.Axis`` is to processes."""

    rank: int
    meeting: Meeting

    @property
    def size(self) -> int:
        return self.meeting.size

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self.meeting.exchange(self.rank, tensor).sum(dim=0).to(tensor.dtype))

    def gather(self, tensor: Tensor) -> Tensor:
        return self.meeting.exchange(self.rank, tensor)


@dataclass(frozen=True)
class SimulatedMesh:
    """One of data_parallel.size x tensor_parallel.size threads; tensor-parallel ranks are neighbours."""

    whole: SimulatedRanks
    data_parallel: SimulatedRanks
    tensor_parallel: SimulatedRanks


def on_shards(num_shards: int, function: Callable[[int, SimulatedRanks], Any]) -> list[Any]:
    """``function(rank, ranks)`` on every simulated rank; what each returned."""
    return on_mesh(num_shards, 1, lambda mesh: function(mesh.whole.rank, mesh.whole))


def on_mesh(num_replicas: int, num_shards: int, function: Callable[[SimulatedMesh], Any]) -> list[Any]:
    """``function(mesh)`` on num_replicas x num_shards simulated ranks; what each returned."""
    world = Meeting(num_replicas * num_shards)
    of_shard = [Meeting(num_replicas) for _ in range(num_shards)]
    of_replica = [Meeting(num_shards) for _ in range(num_replicas)]

    def run(rank: int) -> Any:
        replica, shard = divmod(rank, num_shards)
        mesh = SimulatedMesh(
            SimulatedRanks(rank, world),
            SimulatedRanks(replica, of_shard[shard]),
            SimulatedRanks(shard, of_replica[replica]),
        )
        try:
            return function(mesh)
        except BaseException:
            for meeting in (world, *of_shard, *of_replica):
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(world.size) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(world.size)]]


def cuts(numel: int, points: Sequence[int]) -> list[tuple[int, int]]:
    """The pieces [start, stop) into which sorted cut points divide a flat tensor; pieces may be empty."""
    bounds = [0, *sorted(min(point, numel) for point in points), numel]
    return list(pairwise(bounds))
