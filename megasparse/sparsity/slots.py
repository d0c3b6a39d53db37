"""Where the active blocks of a layer with packed storage lie in its weight, [capacity, block_size, block_size].

    slot_blocks = assign_slots(mask, capacity)                # int32 [capacity]: the block in each slot, or EMPTY
    slot_blocks = reassigned_slots(slot_blocks, new_mask)     # after a topology update: blocks that stay do not move

Blocks are numbered row by row on the grid of this rank's shard. All ranks that hold the same mask find the same slots,
from the mask alone, so that no state has to move between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import assign_slots
from megasparse.sparsity.chunks import positions

EMPTY = -1
"""In place of a block's number; the weights of such a slot are exactly 0."""


def reassigned_slots(slot_blocks: Tensor, mask: Tensor) -> Tensor:
    """Slots after the mask has changed, int32 [capacity]: blocks that are still active keep theirs; those that are new,
    in ascending order, take the other slots in ascending order; what is left over is empty."""
    active = mask.reshape(-1)
    held = slot_blocks.clamp(min=0).long()
    stays = (slot_blocks != EMPTY) & active[held]
    is_new = active.clone()
    is_new[held[stays]] = False
    new = positions(is_new)
    free = positions(~stays)
    assert len(new) <= len(free), f"{int(active.sum())} active blocks do not fit into {len(slot_blocks)} slots"
    found = torch.where(stays, slot_blocks, EMPTY)
    found[free[: len(new)]] = new.to(torch.int32)
    return found


def carried_slots(before: Tensor | None, mask: Tensor, capacity: int) -> Tensor:
    """Slots of a mask in storage of some capacity, where that of the state at hand has the slots `before` (None: it is
    a whole matrix): the same where there are as many, so that nothing changes by being moved, ascending otherwise."""
    if before is not None and len(before) == capacity:
        return reassigned_slots(before, mask)
    return assign_slots(mask, capacity)


@dataclass(frozen=True)
class Slots:
    """The slots of one layer, and the entries of its flat weight that they are.

    slot_blocks: the layer's own buffer, changed in place by ``follow``.
    """

    slot_blocks: Tensor
    block_size: int

    @property
    def capacity(self) -> int:
        return self.slot_blocks.numel()

    def follow(self, mask: Tensor) -> None:
        """Let the slots hold the blocks of a new mask."""
        self.slot_blocks.copy_(reassigned_slots(self.slot_blocks, mask))

    def of_blocks(self, blocks: Tensor) -> Tensor:
        """What a bool of each block of the grid, in any shape, says of each slot's: bool [capacity], empty: False."""
        return (self.slot_blocks != EMPTY) & blocks.reshape(-1)[self.slot_blocks.clamp(min=0).long()]

    def entries(self, slots: Tensor, start: int, numel: int) -> Tensor:
        """A bool of each slot for entries [start, start + numel) of the flat weight: bool [numel]."""
        size = self.block_size**2
        first, last = start // size, -(-(start + numel) // size)
        return slots[first:last].repeat_interleave(size)[start - first * size :][:numel]

    def active_entries(self, start: int, numel: int) -> Tensor:
        """Which of these entries belong to a block: bool [numel]."""
        return self.entries(self.slot_blocks != EMPTY, start, numel)

    def block_sums(self, values: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        """Sums of squares by block, float64 on the grid; values: float32 [n], entries [start, start + n) of the flat
        weight. Blocks that have no entry there are 0."""
        size, sums = self.block_size**2, torch.zeros(grid[0] * grid[1], dtype=torch.float64, device=values.device)
        first, last = start // size, -(-(start + values.numel()) // size)
        squares = torch.zeros((last - first) * size, dtype=torch.float64, device=values.device)
        squares[start - first * size :][: values.numel()] = values.to(torch.float64).square()
        held = self.slot_blocks[first:last].to(values.device)
        used = held != EMPTY
        sums[held[used].long()] = squares.view(-1, size).sum(dim=1)[used]
        return sums.view(grid)

    def write(self, flat: Tensor, start: int, slots: Tensor, blocks: Tensor) -> None:
        """Put whole blocks [m, block_size, block_size] into slots, int64 [m], as far as they lie in `flat`, the entries
        from `start` on of the flat weight."""
        size = self.block_size**2
        for slot, block in zip(slots.tolist(), blocks.reshape(-1, size).to(flat.device, flat.dtype), strict=True):
            begin, end = max(slot * size, start), min((slot + 1) * size, start + flat.numel())
            if begin < end:
                flat[begin - start : end - start] = block[begin - slot * size : end - slot * size]
