"""Random weights in packed storage for tests: slots in random order, some empty, some block rows and columns empty."""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import BlockIndex, assign_slots, build_index, pack


def packed_weight(
    grid: tuple[int, int],
    block: int,
    dtype: torch.dtype,
    *,
    density: float = 0.4,
    empty: int = 3,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, BlockIndex]:
    """A weight [S, block, block] with `empty` empty slots, and its index. Where density lies between 0 and 1, grids of
    more than one row and column have an empty block row, an empty block column and at least one block."""
    rows, columns = grid
    mask = torch.rand(grid, generator=generator) < density
    if 0 < density < 1 and min(grid) > 1:
        mask[rows // 2], mask[:, columns // 2], mask[0, 0] = False, False, True
    slots = assign_slots(mask, max(int(mask.sum()) + empty, 1))
    slots = slots[torch.randperm(len(slots), generator=generator)]
    weight = torch.randn(rows * block, columns * block, generator=generator).to(dtype)
    return pack(weight, slots, block), build_index(mask, block, slot_blocks=slots)


def matrix(weight: Tensor, index: BlockIndex) -> Tensor:
    """The weight [out, in], entry by entry as the definition says."""
    block, (_, columns) = index.block_size, index.mask.shape
    dense = weight.new_zeros(tuple(size * block for size in index.mask.shape))
    for slot, number in enumerate(index.slot_blocks.tolist()):
        if number >= 0:
            row, column = divmod(number, columns)
            dense[row * block : (row + 1) * block, column * block : (column + 1) * block] = weight[slot]
    return dense


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
