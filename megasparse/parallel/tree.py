"""All ranks of a run over gloo, in a tree of small groups: decisions on the host, however many ranks there are.

    control = make_control(world, timeout)       # every rank, after all groups that not every rank is in
    control.max_(tensor)

gloo connects each rank of a group with each other one. In one group of 16,384 ranks that is 16,383 connections of every
rank, and a ring of as many hops. Here neighbours form groups of `GROUP_RANKS`, their first ranks the groups of the next
level, and so on: a rank has at most `GROUP_RANKS` - 1 connections in each of log(ranks) levels. A reduction goes up
through the groups and its result down again. Up to `GROUP_RANKS` ranks are one plain group.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megasparse.parallel.group import CommunicationGroup

GROUP_RANKS = 32


@dataclass(frozen=True)
class TreeGroup(CommunicationGroup):
    """All ranks of the tree. Sums of floats are the same bits on all of them; their order is that of the tree."""

    levels: tuple[CommunicationGroup, ...] = ()
    """The groups that this rank is in, of neighbours first. Rank 0 of each is in a group of the next level too, but for
    the last level, which has one group."""
    depth: int = 1
    """Levels of the tree."""

    @property
    def groups(self) -> tuple[CommunicationGroup, ...]:
        return self.levels

    def sum_(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def first_(self, tensor: Tensor) -> Tensor:
        # The groups that this rank is the first of come after the one in which it is told.
        for level in reversed(self.levels):
            level.first_(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Costs every rank the bytes of all: for what happens seldom, such as telling which ranks were wrong."""
        own = tensor.contiguous().view(-1).view(torch.uint8)
        rows = torch.zeros((self.size, own.numel()), dtype=torch.uint8)
        rows[self.rank] = own
        return self.sum_(rows).view(-1).view(tensor.dtype).view(self.size, *tensor.shape)

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        return self.sum_(tensor.clone())[self.rank]

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        for level in self.levels:
            if level.size > 1:
                dist.all_reduce(tensor, op=operation, group=level.group)
        # The last group knows the result already.
        for level in reversed(self.levels[: self.depth - 1]):
            level.first_(tensor)
        return tensor


def make_control(world: CommunicationGroup, timeout: timedelta, group_ranks: int = GROUP_RANKS) -> CommunicationGroup:
    """The ranks of `world` over gloo.

    Torch gives a group that only its ranks make a name by how many groups a rank has made. First ranks make more of
    them here than others, so this must be the last that makes such groups.
    """
    if world.size == 1:
        return world
    if world.size <= group_ranks:
        return CommunicationGroup(world.rank, world.size, dist.new_group(backend="gloo", timeout=timeout))
    levels, stride, depth = [], 1, 0
    while stride < world.size:
        depth += 1
        if world.rank % stride == 0:
            number = world.rank // stride
            start = number - number % group_ranks
            ranks = list(range(start * stride, min((start + group_ranks) * stride, world.size), stride))
            # One of a single rank too: the first ones of a level must have made as many as each other.
            levels.append(CommunicationGroup(number - start, len(ranks), own_group(ranks, timeout, "gloo")))
        stride *= group_ranks
    return TreeGroup(world.rank, world.size, None, tuple(levels), depth)


def own_group(ranks: list[int], timeout: timedelta, backend: str) -> dist.ProcessGroup:
    """A group that none but its ranks make. (DeepSpeed takes None for all ranks, so that one rank is a group too.)"""
    return dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
