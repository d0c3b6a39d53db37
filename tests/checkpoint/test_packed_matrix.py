"""Packed matrices of a checkpoint, read as matrices and as blocks, for any shard and any fragment."""

from __future__ import annotations

from math import prod

import pytest
import torch

from megasparse.checkpoint.packed import PackedMatrix, blocks_of_strips, own_numbers, whole_numbers
from megasparse.kernels.block_sparse import pack, unpack
from megasparse.parallel import ShardSpec
from megasparse.sparsity.slots import EMPTY

GRID, SIDE = (6, 8), 4
SPECS = [
    ShardSpec((24, 32)),
    ShardSpec((24, 32), 0, 2),
    ShardSpec((24, 32), 0, 2, (8, 8, 8)),
    ShardSpec((24, 32), 1, 4),
]


def case(seed: int, dtype: torch.dtype = torch.float32):
    """Slots, packed values, the matrix, and what reads slots, with the runs that it was asked for."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.full((20,), EMPTY, dtype=torch.int32)
    held = torch.randperm(20, generator=generator)[:15]
    slots[held] = torch.randperm(prod(GRID), generator=generator)[:15].to(torch.int32)
    values = torch.randint(1, 1000, (20, SIDE, SIDE), generator=generator).to(dtype)
    values[slots == EMPTY] = 0
    runs = []

    def read(first: int, count: int) -> torch.Tensor:
        runs.append((first, count))
        return values[first : first + count].reshape(-1)

    return slots, values, unpack(values, slots, GRID), read, runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("spec", SPECS)
def test_any_fragment_is_that_of_the_matrix(spec, dtype) -> None:
    slots, _, matrix, read, _ = case(3, dtype)
    packed = PackedMatrix(GRID, SIDE, slots)
    for rank in range(spec.size):
        shard = spec.shard(matrix, rank).reshape(-1)
        for start, numel in [(0, shard.numel()), (0, 0), (5, 1), (37, 90), (shard.numel() - 7, 7)]:
            found = packed.fragment(spec, rank, start, numel, read)
            assert torch.equal(found.to(dtype), shard[start : start + numel]), (rank, start, numel)


@pytest.mark.parametrize("spec", SPECS)
def test_blocks_by_their_numbers_on_a_shard(spec) -> None:
    slots, _, matrix, read, _ = case(4)
    grid = spec.blocks(SIDE)
    for rank in range(spec.size):
        shard, count = spec.shard(matrix, rank), prod(grid.local_shape)
        numbers = torch.randperm(count)
        numbers[::5] = EMPTY
        expected = pack(shard, numbers, SIDE)
        whole = whole_numbers(grid, rank, numbers)
        assert torch.equal(PackedMatrix(GRID, SIDE, slots).blocks(whole, read), expected)
        # The same of a matrix that is stored whole.
        strips = matrix.view(GRID[0], -1)
        assert torch.equal(blocks_of_strips(whole, GRID[1], SIDE, lambda row, s=strips: s[row]), expected)
        assert torch.equal(own_numbers(grid, rank, whole), numbers.to(torch.int32))


def test_slots_that_follow_each_other_are_read_at_once() -> None:
    slots, values, _, read, runs = case(5)
    packed = PackedMatrix(GRID, SIDE, slots)
    assert torch.equal(packed.blocks(slots.long(), read), values)
    used = (slots != EMPTY).nonzero().view(-1).tolist()
    assert sum(count for _, count in runs) == len(used)
    assert len(runs) == 1 + sum(b - a > 1 for a, b in zip(used, used[1:], strict=False))
    runs.clear()
    assert not packed.blocks(torch.tensor([EMPTY, EMPTY]), read).any() and not runs
