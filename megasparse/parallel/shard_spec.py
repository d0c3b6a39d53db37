"""How one parameter is divided over the tensor-parallel ranks: declared once, by the layer that owns it.

    weight = nn.Parameter(partition.shard(full, rank))
    partition.declare(weight)
    ...
    full = shard_spec_of(weight).merge(shards)

A parameter is replicated, or divided along one dimension. That dimension may consist of fused parts (the query, key and
value rows of one matrix), each of which is divided by itself: a shard holds its share of every part, in their order.
Checkpoints, conversion, the gradient norm, FLOP counts and the topology all read this one declaration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ShardSpec:
    """shape: of the whole parameter. dim: the divided dimension, None: every rank holds everything."""

    shape: tuple[int, ...]
    dim: int | None = None
    size: int = 1
    """Tensor-parallel ranks."""
    parts: tuple[int, ...] = ()
    """Sizes of the fused parts along `dim`; empty: one part."""

    def __post_init__(self) -> None:
        if self.dim is not None:
            assert sum(self.divided_parts) == self.shape[self.dim], f"{self.parts} are not the parts of {self.shape}"
            assert all(part % self.size == 0 for part in self.divided_parts), f"{self} does not divide"

    @property
    def divided_parts(self) -> tuple[int, ...]:
        return self.parts or ((self.shape[self.dim],) if self.dim is not None else ())

    @property
    def is_divided(self) -> bool:
        """Whether ranks hold different entries."""
        return self.dim is not None and self.size > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of a shard."""
        return tuple(n // self.size if at == self.dim else n for at, n in enumerate(self.shape))

    def indices(self, dim: int, rank: int) -> Tensor:
        """Positions along `dim` of the whole parameter that a rank's shard holds, int64, in the shard's order."""
        if dim != self.dim:
            return torch.arange(self.shape[dim])
        starts, start = [], 0
        for part in self.divided_parts:
            share = part // self.size
            starts.append(torch.arange(start + rank * share, start + (rank + 1) * share))
            start += part
        return torch.cat(starts)

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """A rank's shard of the whole parameter, a contiguous tensor (the argument itself where nothing is divided)."""
        assert tuple(full.shape) == self.shape, f"{tuple(full.shape)} is not {self.shape}"
        if not self.is_divided:
            return full
        parts = full.split(self.divided_parts, dim=self.dim)
        return torch.cat([part.chunk(self.size, dim=self.dim)[rank] for part in parts], dim=self.dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole parameter from the shards of all ranks, in their order; the inverse of ``shard``."""
        if not self.is_divided:
            return shards[0]
        assert len(shards) == self.size, f"{len(shards)} shards for {self.size} ranks"
        shares = [part // self.size for part in self.divided_parts]
        pieces = [shard.split(shares, dim=self.dim) for shard in shards]
        return torch.cat([piece for part in zip(*pieces, strict=True) for piece in part], dim=self.dim)

    def blocks(self, block_size: int) -> ShardSpec:
        """The same division on the grid of `block_size` x `block_size` blocks of a matrix. `block_size` must divide
        every share."""
        assert all(part // self.size % block_size == 0 for part in self.divided_parts), (
            f"{block_size} does not divide {self}"
        )
        return ShardSpec(
            tuple(n // block_size for n in self.shape),
            self.dim,
            self.size,
            tuple(part // block_size for part in self.parts),
        )

    def declare(self, parameter: Tensor) -> None:
        """Attach this partition to a parameter. DeepSpeed's gradient norm reads `tensor_model_parallel`."""
        # Not `partition`: at ZeRO stage 3 DeepSpeed puts a method of that name on every parameter.
        parameter.tensor_partition = self
        parameter.tensor_model_parallel = self.is_divided


def shard_spec_of(parameter: Tensor) -> ShardSpec:
    """The declared partition; a parameter without one is replicated."""
    declared = getattr(parameter, "tensor_partition", None)
    return declared if declared is not None else ShardSpec(tuple(parameter.shape))
