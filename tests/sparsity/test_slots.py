"""Slots of packed storage: blocks that stay do not move, new ones take what is free, and every rank finds the same."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.block_sparse import assign_slots, pack, unpack
from megasparse.sparsity.scores import block_partial_sums
from megasparse.sparsity.slots import EMPTY, Slots, carried_slots, reassigned_slots

GRID, SIDE = (5, 7), 3


def random_mask(generator: torch.Generator, active: int) -> torch.Tensor:
    mask = torch.zeros(GRID[0] * GRID[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:active]] = True
    return mask.view(GRID)


@pytest.mark.parametrize("seed", range(5))
def test_slots_follow_the_mask_over_many_updates(seed) -> None:
    generator, capacity = torch.Generator().manual_seed(seed), 20
    mask = random_mask(generator, 12)
    slots = assign_slots(mask, capacity)
    for active in (12, 20, 1, 0, 13, 20):
        new = random_mask(generator, active)
        before, slots = slots, reassigned_slots(slots, new)
        assert sorted(slots[slots != EMPTY].tolist()) == new.view(-1).nonzero().view(-1).tolist()
        held = before != EMPTY
        stays = held & new.view(-1)[before.clamp(min=0).long()]
        assert torch.equal(slots[stays], before[stays]), "a block that stays has moved"
        grown = slots[~stays]
        grown = grown[: int((grown != EMPTY).sum())]
        assert grown.tolist() == sorted(grown.tolist()) and EMPTY not in grown, "free slots are filled from the front"


def test_a_mask_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(AssertionError, match="do not fit into 3 slots"):
        reassigned_slots(torch.full((3,), EMPTY, dtype=torch.int32), torch.ones(2, 2, dtype=torch.bool))


def test_slots_are_carried_over_where_there_are_as_many() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = random_mask(generator, 6)
    before = assign_slots(mask, 9)[torch.randperm(9, generator=generator)]
    assert torch.equal(carried_slots(before, mask, 9), before)
    for other in (carried_slots(before, mask, 8), carried_slots(None, mask, 8)):
        assert torch.equal(other, assign_slots(mask, 8))


@pytest.mark.parametrize("start,numel", [(0, 180), (0, 1), (17, 80), (9, 9), (63, 117), (170, 10)])
def test_entries_sums_and_writes_of_any_piece(start, numel) -> None:
    generator, capacity = torch.Generator().manual_seed(start), 20
    mask = random_mask(generator, 15)
    slots = Slots(assign_slots(mask, capacity)[torch.randperm(capacity, generator=generator)], SIDE)
    weight = pack(torch.randn(15, 21, generator=generator), slots.slot_blocks, SIDE).view(-1)
    piece = weight[start : start + numel]
    assert torch.equal(slots.active_entries(start, numel), piece != 0)

    wanted = random_mask(generator, 9)
    of_slots = slots.of_blocks(wanted)
    plain = [block != EMPTY and bool(wanted.view(-1)[block]) for block in slots.slot_blocks.tolist()]
    assert of_slots.tolist() == plain
    assert slots.entries(of_slots, start, numel).tolist() == [plain[i // 9] for i in range(start, start + numel)]

    # The sums of a matrix that is 0 outside of the piece.
    alone = torch.zeros_like(weight)
    alone[start : start + numel] = piece
    matrix = unpack(alone.view(-1, SIDE, SIDE), slots.slot_blocks, GRID)
    expected = block_partial_sums(matrix.view(-1), 0, GRID, SIDE)
    assert torch.allclose(slots.block_sums(piece, start, GRID), expected, rtol=1e-14, atol=0)

    chosen, blocks = torch.tensor([2, 7, 19]), torch.randn(3, SIDE, SIDE, generator=generator)
    changed = weight.clone().view(-1, SIDE * SIDE)
    changed[chosen] = blocks.flatten(1)
    written = piece.clone()
    slots.write(written, start, chosen, blocks)
    assert torch.equal(written, changed.view(-1)[start : start + numel])
