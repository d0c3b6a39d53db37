"""Which units of one weight matrix active.

A unit is one weight or one b x b block. ``Topology`` wraps the mask of a layer on its unit grid (the layer's own
buffer, changed in place, so that kernels see every change) and gives the forms that others need: counts, bits for
storage, slices of the flat weight for the ranks that hold a piece of it. The mask is that of this rank's
tensor-parallel shard; units have global numbers, row by row in the grid of the whole matrix, which no layout changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from megasparse.parallel import ShardSpec


@dataclass(frozen=True)
class Topology:
    """mask: bool, the unit grid of this rank's shard, changed in place by ``replace``."""

    name: str
    mask: Tensor
    block_size: int
    grid: ShardSpec | None = None
    """How the grid of the whole matrix is divided; None: it is not."""
    rank: int = 0
    """Tensor-parallel rank of this shard."""

    @cached_property
    def whole_grid(self) -> ShardSpec:
        return self.grid if self.grid is not None else ShardSpec(tuple(self.mask.shape))

    @cached_property
    def num_units(self) -> int:
        """Units of the whole matrix."""
        return prod(self.whole_grid.shape)

    @property
    def num_shards(self) -> int:
        """Tensor-parallel shards; 1 where every rank holds the same."""
        return self.whole_grid.size if self.whole_grid.is_divided else 1

    @cached_property
    def numel(self) -> int:
        """Weights of the whole matrix."""
        return self.num_units * self.block_size**2

    @property
    def shard_units(self) -> int:
        return self.mask.numel()

    @property
    def shard_width(self) -> int:
        """Columns of the shard's weight matrix."""
        return self.mask.shape[1] * self.block_size

    def replace(self, active: Tensor) -> None:
        """Take over a new bool mask of the shard's units (any shape with shard_units entries)."""
        self.mask.copy_(active.view_as(self.mask))

    def unit_numbers(self, start: int, numel: int) -> Tensor:
        """Global numbers of the units [start, start + numel) of the shard, int32 [numel] on the mask's device."""
        device = self.mask.device
        if self.num_shards == 1:
            return torch.arange(start, start + numel, dtype=torch.int32, device=device)
        width = self.shard_columns.numel()
        first_row, last_row = start // width, -(-(start + numel) // width)
        row_starts = (self.shard_rows[first_row:last_row] * self.whole_grid.shape[1]).to(device, torch.int32)
        numbers = row_starts.unsqueeze(1) + self.shard_columns.to(device, torch.int32)
        offset = start - first_row * width
        return numbers.reshape(-1)[offset : offset + numel]

    @cached_property
    def shard_rows(self) -> Tensor:
        """Rows of the whole grid that the shard holds, int64."""
        return self.whole_grid.indices(0, self.rank)

    @cached_property
    def shard_columns(self) -> Tensor:
        return self.whole_grid.indices(1, self.rank)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the shard's units in their places among those of the whole matrix, 0 elsewhere: [num_units]."""
        if self.num_shards == 1:
            return values.reshape(-1)
        whole = torch.zeros(self.num_units, dtype=values.dtype, device=values.device)
        whole[self.unit_numbers(0, self.shard_units)] = values.reshape(-1)
        return whole

    def pick(self, values: Tensor, rank: int | None = None) -> Tensor:
        """The part of this shard, or of another rank's, in one value per unit of the whole matrix: [shard_units]."""
        if self.num_shards == 1:
            return values.reshape(-1)
        return self.whole_grid.shard(values.view(self.whole_grid.shape), self.rank if rank is None else rank).reshape(
            -1
        )

    def weights_slice(self, start: int, numel: int, units: Tensor | None = None) -> Tensor:
        """The mask of weights [start, start + numel) of the flat shard, as bool [numel].

        units: another bool tensor on the shard's unit grid to expand in place of the mask.
        """
        grid = self.mask if units is None else units.view_as(self.mask)
        if self.block_size == 1:
            return grid.reshape(-1)[start : start + numel]
        width = self.shard_width
        first_row, last_row = start // width, -(-(start + numel) // width)
        rows = torch.arange(first_row, last_row, device=grid.device) // self.block_size
        expanded = grid.index_select(0, rows).repeat_interleave(self.block_size, dim=1).reshape(-1)
        offset = start - first_row * width
        return expanded[offset : offset + numel]


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask of any shape as uint8 bits, eight units to a byte, in row-major order, low bit first."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack_bits(bits: Tensor, num_units: int) -> Tensor:
    """The inverse of ``pack_bits``: bool [num_units]. Raises ValueError where the length does not fit."""
    if bits.numel() != -(-num_units // 8):
        raise ValueError(f"{bits.numel()} bytes of mask bits do not hold {num_units} units")
    unpacked = np.unpackbits(bits.cpu().numpy(), count=num_units, bitorder="little")
    return torch.from_numpy(unpacked.view(np.bool_))
