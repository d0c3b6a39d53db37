"""Matrices of which a checkpoint holds the active blocks only, in slots: read as matrices, or block by block.

    matrix = PackedMatrix(grid, block_size, slots)          # slots: the block in each slot
    entries = matrix.fragment(spec, rank, start, numel, read)
    blocks = matrix.blocks(numbers, read)                   # [n, block_size, block_size]

`read(first, count)` gives the entries of consecutive slots, flat; what is wanted is read in as few of such runs as
there are. Blocks have numbers row by row on the grid of the whole matrix here, which no layout changes.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor

from megasparse.parallel import ShardSpec
from megasparse.sparsity.slots import EMPTY

ReadSlots = Callable[[int, int], Tensor]
ReadStrip = Callable[[int], Tensor]
"""Number of a row of blocks -> its entries, flat."""


class PackedMatrix:
    """grid: rows and columns of blocks. slots: int32 [n], the block in each slot, EMPTY where there is none."""

    def __init__(self, grid: tuple[int, int], block_size: int, slots: Tensor) -> None:
        self.grid, self.block_size, self.slots = grid, block_size, slots
        # One more than there are blocks: the number -1 finds it.
        self._slot_of = torch.full((prod(grid) + 1,), EMPTY, dtype=torch.int64)
        used = torch.nonzero(slots != EMPTY).view(-1)
        self._slot_of[slots[used].long()] = used

    def blocks(self, numbers: Tensor, read: ReadSlots) -> Tensor:
        """Blocks by number, int64 [n]: [n, block_size, block_size]; zeros where no slot has it."""
        places = self._slot_of[numbers]
        wanted, back = np.unique(places[places != EMPTY].numpy(), return_inverse=True)
        edges = np.flatnonzero(np.diff(wanted) != 1) + 1
        runs = [run for run in np.split(wanted, edges) if len(run)]
        pieces = [read(int(run[0]), len(run)) for run in runs]
        shape = (len(numbers), self.block_size, self.block_size)
        if not pieces:
            # Whatever kind is asked for: the caller puts them into its own tensor.
            return torch.zeros(shape)
        held = torch.cat(pieces).view(-1, *shape[1:])
        found = torch.zeros(shape, dtype=held.dtype)
        found[places != EMPTY] = held[torch.from_numpy(back)]
        return found

    def fragment(self, spec: ShardSpec, rank: int, start: int, numel: int, read: ReadSlots) -> Tensor:
        """Entries [start, start + numel) of the shard of a tensor-parallel rank, flattened."""
        own, size = spec.blocks(self.block_size), self.block_size
        columns = own.local_shape[1]
        strip = size * columns * size
        first, last = start // strip, -(-(start + numel) // strip)
        blocks = self.blocks(whole_numbers(own, rank, torch.arange(first * columns, last * columns)), read)
        rows = blocks.view(last - first, columns, size, size).transpose(1, 2).reshape(-1)
        return rows[start - first * strip :][:numel].clone()


def whole_numbers(grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
    """Numbers of blocks, int64, on the whole grid, from those on the part of a tensor-parallel rank; EMPTY stays."""
    if not grid.is_divided:
        return numbers
    columns = grid.local_shape[1]
    held = numbers.clamp(min=0)
    whole = grid.indices(0, rank)[held // columns] * grid.shape[1] + grid.indices(1, rank)[held % columns]
    return torch.where(numbers == EMPTY, EMPTY, whole)


def own_numbers(grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
    """The inverse, int32: numbers on the part of a rank, which must hold all of them; EMPTY stays."""
    if not grid.is_divided:
        return numbers.to(torch.int32)
    own = torch.full((prod(grid.shape) + 1,), EMPTY, dtype=torch.int32)
    local = torch.arange(prod(grid.local_shape))
    own[whole_numbers(grid, rank, local)] = local.to(torch.int32)
    return own[numbers.long()]


def blocks_of_strips(numbers: Tensor, columns: int, block_size: int, read: ReadStrip) -> Tensor:
    """Blocks by number, int64 [n], of a matrix that is stored whole, of which rows of blocks are read, one in memory at
    a time: [n, block_size, block_size]; zeros for EMPTY."""
    found: Tensor | None = None
    for row in torch.unique(numbers[numbers != EMPTY] // columns).tolist():
        of_row = torch.nonzero((numbers != EMPTY) & (numbers // columns == row)).view(-1)
        strip = read(row).view(block_size, columns, block_size)
        if found is None:
            found = torch.zeros(len(numbers), block_size, block_size, dtype=strip.dtype)
        found[of_row] = strip[:, numbers[of_row] % columns].transpose(0, 1)
    return torch.zeros(len(numbers), block_size, block_size) if found is None else found
