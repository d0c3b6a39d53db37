"""Where the active blocks of a weight matrix lie: lists by block row and by block column.

``build_index(mask, block_size, num_active)`` makes them on the mask's device without asking the device anything, so
that a topology update costs no round trip to the host. The lists are those of a compressed sparse row matrix without
values, and beside them the same blocks in column order, for the input gradient.

A weight is stored in one of two ways. Dense: [out, in], zero in inactive blocks. Packed: [S, block_size, block_size],
its active blocks only, in slots; `slot_blocks` says which block lies in which slot, in any order, and the index then
also holds the slot of each active block (``storage`` goes from one to the other).

Names: R block rows, C block columns, L active blocks, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockIndex:
    """Active blocks of side `block_size`. All lists are int32 on the mask's device; a unit of 1 has none (empty
    tensors). The last four are None for dense storage."""

    mask: Tensor
    """bool [R, C], True where the block is active."""
    block_size: int
    """Side of the square blocks."""
    num_active: int
    """L."""
    row_offsets: Tensor
    """[R + 1]: block row r holds the active blocks row_offsets[r] to row_offsets[r + 1] of `columns`."""
    columns: Tensor
    """[L]: block column of each active block, by rows, ascending within each row."""
    rows: Tensor
    """[L]: block row of each of the same blocks."""
    column_offsets: Tensor
    """[C + 1]: block column c holds the active blocks column_offsets[c] to column_offsets[c + 1] of `column_rows`."""
    column_rows: Tensor
    """[L]: block row of each active block, by columns, ascending within each column."""
    row_order: Tensor
    """[R]: block rows, those with most active blocks first: started in this order, uneven rows end together."""
    column_order: Tensor
    """[C]: block columns, those with most active blocks first."""
    slot_blocks: Tensor | None = None
    """[S]: flat number, row * C + column, of the block that each slot holds; -1: the slot is empty."""
    row_slots: Tensor | None = None
    """[L]: slot of each active block, by rows, as `columns`."""
    column_slots: Tensor | None = None
    """[L]: slot of each active block, by columns, as `column_rows`."""
    block_slots: Tensor | None = None
    """[R, C]: slot of each block; -1: the block is inactive."""

    @property
    def density(self) -> float:
        return self.num_active / self.mask.numel()

    @property
    def is_packed(self) -> bool:
        return self.slot_blocks is not None

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """All lists that there are, in the order of the fields."""
        by_rows = self.row_offsets, self.columns, self.rows
        every = *by_rows, self.column_offsets, self.column_rows, self.row_order, self.column_order
        slots = self.slot_blocks, self.row_slots, self.column_slots, self.block_slots
        return *every, *(held for held in slots if held is not None)


def build_index(
    mask: Tensor, block_size: int, num_active: int | None = None, slot_blocks: Tensor | None = None
) -> BlockIndex:
    """Index of the active blocks of `mask`.

    Args:
        mask: bool [R, C].
        block_size: side of the square blocks; 1: no lists are made, as no kernel reads them.
        num_active: how many blocks are active; None asks the device.
        slot_blocks: int32 [S], for packed storage, see ``BlockIndex``: each active block in exactly one slot.

    Raises:
        RuntimeError: mask and slots are not of the same blocks (on GPUs, when the device comes to it).
    """
    if num_active is None:
        num_active = int(mask.sum())
    if block_size == 1:
        assert slot_blocks is None, "single weights have no packed storage"
        none = torch.empty(0, dtype=torch.int32, device=mask.device)
        return BlockIndex(mask, block_size, num_active, *[none] * 7)
    row_offsets, columns, rows, row_order = _lists(mask, num_active)
    column_offsets, column_rows, by_columns, column_order = _lists(mask.t(), num_active)
    lists = row_offsets, columns, rows, column_offsets, column_rows, row_order, column_order
    if slot_blocks is None:
        return BlockIndex(mask, block_size, num_active, *lists)
    block_slots = _slots_of_blocks(mask, slot_blocks)
    row_slots, column_slots = block_slots[rows, columns], block_slots[column_rows, by_columns]
    return BlockIndex(mask, block_size, num_active, *lists, slot_blocks, row_slots, column_slots, block_slots)


def refresh_index(index: BlockIndex) -> None:
    """Bring the lists up to date after a change of the mask, and of the slots, that left as many blocks active.

    In place: CUDA graphs and compiled code that hold the addresses of the lists see the new ones.
    """
    fresh = build_index(index.mask, index.block_size, index.num_active, index.slot_blocks)
    for held, new in zip(index.lists, fresh.lists, strict=True):
        if held is not new:
            held.copy_(new)


def _lists(mask: Tensor, num_active: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, columns and rows of the active entries in row-major order, and the rows by falling number of them."""
    counts = mask.sum(1)
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = counts.cumsum(0)
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    # A stable sort brings the active entries to the front in their order; `nonzero` would wait for the device.
    places = mask.reshape(-1).to(torch.uint8).argsort(descending=True, stable=True)[:num_active]
    return offsets, (places % mask.shape[1]).to(torch.int32), (places // mask.shape[1]).to(torch.int32), order


def _slots_of_blocks(mask: Tensor, slot_blocks: Tensor) -> Tensor:
    """[R, C]: the slot of each block, -1 where none holds it."""
    assert slot_blocks.dtype == torch.int32 and slot_blocks.dim() == 1, f"{slot_blocks.dtype} {slot_blocks.shape}"
    # Empty slots point to an entry behind the grid, which is cut off.
    targets = torch.where(slot_blocks < 0, mask.numel(), slot_blocks).long()
    slots = torch.full((mask.numel() + 1,), -1, dtype=torch.int32, device=mask.device)
    slots[targets] = torch.arange(len(slot_blocks), dtype=torch.int32, device=mask.device)
    block_slots = slots[:-1].view(mask.shape)
    # A kernel would read beyond the slots. An assertion in the device's own time waits for nothing.
    agree = ((block_slots >= 0) == mask).all() & ((slot_blocks >= 0).sum() == mask.sum())
    torch._assert_async(agree, "mask and slot_blocks are not of the same blocks, or a block has two slots")
    return block_slots
