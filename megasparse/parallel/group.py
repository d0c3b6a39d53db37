"""One direction of the mesh: ranks that share something, and the collectives between them.

axis.sum_(tensor)          # in place, over the ranks of the axis
rows = axis.gather(row)    # [axis.size, ...]

An axis of size 1 needs no process group, and its collectives do nothing. An axis with a size and no group serves plans:
shapes can be built for it, nothing can be communicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class CommunicationGroup:
    """This process is number `rank` of `size`."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def groups(self) -> tuple[CommunicationGroup, ...]:
        """The process groups that it consists of, which connect each of their ranks with each."""
        return (self,) if self.size > 1 else ()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Largest value over the ranks, in place, element by element."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def first_(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0 on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Stack the equally shaped tensors of all ranks: [size, *tensor.shape]."""
        if self.size == 1:
            return tensor.unsqueeze(0)
        rows = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        dist.all_gather_into_tensor(rows.view(-1), tensor.contiguous().view(-1), group=self.group)
        return rows

    def scatter_sum(self, tensor: Tensor) -> Tensor:
        """Add up [size, ...] over the ranks and return this rank's row of the sum."""
        if self.size == 1:
            return tensor[0]
        row = torch.empty(tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        # gloo wants both flat.
        dist.reduce_scatter_tensor(row.view(-1), tensor.contiguous().view(-1), group=self.group)
        return row
