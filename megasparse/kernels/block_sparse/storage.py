"""The two ways in which a block-sparse weight is stored, and how to come from one to the other.

Dense: [out, in], zero in inactive units. Packed: [S, block_size, block_size], active blocks in slots, where
`slot_blocks` (int32 [S]) holds the flat number, row * columns + column, of each slot's block on the grid, -1 in empty
slots, whose weights are zero. Nothing here asks the device anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.kernels.block_sparse.index import BlockIndex


def assign_slots(mask: Tensor, capacity: int) -> Tensor:
    """`slot_blocks` of the active blocks in row order, then empty slots: int32 [capacity].

    mask: bool [R, C], with at most `capacity` active blocks; those beyond would get no slot.
    """
    places = mask.reshape(-1).to(torch.uint8).argsort(descending=True, stable=True)[:capacity]
    slots = torch.full((capacity,), -1, dtype=torch.int32, device=mask.device)
    slots[: len(places)] = torch.where(mask.reshape(-1)[places], places, -1).to(torch.int32)
    return slots


def pack(matrix: Tensor, slot_blocks: Tensor, block_size: int) -> Tensor:
    """The blocks of `matrix` [out, in] as packed storage [S, block_size, block_size], exactly zero in empty slots."""
    columns = matrix.shape[1] // block_size
    blocks = matrix.view(-1, block_size, columns, block_size).transpose(1, 2)
    found = slot_blocks.clamp(min=0).long()
    return blocks[found // columns, found % columns].masked_fill_((slot_blocks < 0)[:, None, None], 0)


def unpack(packed: Tensor, slot_blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """[out, in] from packed storage [S, block_size, block_size], zero outside of its blocks. grid: blocks, (R, C)."""
    (rows, columns), block_size = grid, packed.shape[-1]
    blocks = packed.new_zeros(rows * columns + 1, block_size, block_size)
    # Empty slots go to a block behind the grid, which is cut off.
    blocks[torch.where(slot_blocks < 0, rows * columns, slot_blocks).long()] = packed
    ordered = blocks[:-1].view(rows, columns, block_size, block_size).transpose(1, 2)
    return ordered.reshape(rows * block_size, columns * block_size)


def weight_shape(index: BlockIndex) -> tuple[int, ...]:
    """Of the weight as it is stored."""
    if index.slot_blocks is not None:
        return len(index.slot_blocks), index.block_size, index.block_size
    return tuple(size * index.block_size for size in index.mask.shape)


def whole(weight: Tensor, index: BlockIndex) -> Tensor:
    """[out, in] of a weight in either storage; the weight itself where that is what is stored."""
    if index.slot_blocks is None:
        return weight
    rows, columns = index.mask.shape
    return unpack(weight, index.slot_blocks, (rows, columns))


def stored(gradient: Tensor, index: BlockIndex) -> Tensor:
    """A dense gradient [out, in] as the weight is stored, with zeros outside of active units; may change it."""
    if index.slot_blocks is None:
        return apply_mask_(gradient, index.mask, index.block_size)
    return pack(gradient, index.slot_blocks, index.block_size)


@dataclass(frozen=True)
class Places:
    """Where a stored weight, or its gradient, holds the active blocks: all that a kernel must know of the storage.

    Block j of the lists, which belongs to group g (its block row, or its block column), begins at element
    g * group_step + places[j] * place_step; its rows are `row_step` elements apart, and contiguous.
    """

    places: Tensor
    """int32 [L]: the block's index within its group (dense), or its slot (packed)."""
    group_step: int
    place_step: int
    row_step: int


def places_by_rows(weight: Tensor, index: BlockIndex) -> Places:
    """In the order of `index.columns`. A dense weight has contiguous rows, a packed one is contiguous."""
    block_size = index.block_size
    if index.row_slots is not None:
        return Places(index.row_slots, 0, block_size * block_size, block_size)
    return Places(index.columns, weight.stride(0) * block_size, block_size, weight.stride(0))


def places_by_columns(weight: Tensor, index: BlockIndex) -> Places:
    """In the order of `index.column_rows`."""
    block_size = index.block_size
    if index.column_slots is not None:
        return Places(index.column_slots, 0, block_size * block_size, block_size)
    return Places(index.column_rows, block_size, weight.stride(0) * block_size, weight.stride(0))


def apply_mask_(tensor: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Set the entries of inactive units to exactly zero, in place.

    Args:
        tensor: [out, in], any strides.
        mask: bool [out / unit, in / unit], True where the unit is active.
        block_size: side of the square units; 1: single entries.

    Returns:
        `tensor`.
    """
    rows, columns = mask.shape
    assert tensor.shape == (rows * block_size, columns * block_size), (
        f"{tuple(tensor.shape)}, grid {(rows, columns)}, unit {block_size}"
    )
    # Filling, unlike multiplying by zero, also clears infinities and leaves no negative zeros.
    tensor.view(rows, block_size, columns, block_size).masked_fill_(~mask[:, None, :, None], 0)
    return tensor
