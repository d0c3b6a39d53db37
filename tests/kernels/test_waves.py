"""How the tokens of a weight gradient are cut: against a schedule of programs that is played through."""

from __future__ import annotations

import heapq

import pytest
import torch

from megasparse.kernels.block_sparse import gpu, waves
from megasparse.kernels.block_sparse.tiles import WEIGHT_GRADIENT, Tile, default_tile

BF16 = torch.bfloat16
H100 = waves.Processors(132, 228 * 1024, 2**16)


def played(programs: int, seconds: float, places: int) -> float:
    """When the last program ends, where each goes to the place that is free first."""
    free = [0.0] * places
    for _ in range(programs):
        heapq.heappush(free, heapq.heappop(free) + seconds)
    return max(free)


@pytest.mark.parametrize("block_size, room", [(64, 3 * 132), (128, 2 * 132)])
def test_room_on_a_device(block_size, room) -> None:
    """As shared memory and registers of the compiled kernels give it: 72 KiB, 128 x 128; 96 KiB, 118 x 256."""
    assert waves.programs_at_once(default_tile(WEIGHT_GRADIENT, block_size, BF16), BF16, H100) == room
    # However large a tile is, one program must run.
    assert waves.programs_at_once(Tile(128, 1024, 64, warps=4, stages=4), BF16, H100) == 132


@pytest.mark.parametrize("tokens", [4096, 16384])
@pytest.mark.parametrize("programs", [1, 37, 102, 131, 150, 264, 275, 307, 550, 5000])
def test_no_other_number_of_splits_ends_earlier(programs, tokens) -> None:
    tile = default_tile(WEIGHT_GRADIENT, 128, BF16)
    splits = waves.best_splits(tile, BF16, programs, tokens, H100)
    assert 1 <= splits <= tokens // waves.LEAST_TOKENS

    def ends(splits: int) -> float:
        # 256 tokens for sums in float32: 128 x 128 x 8 bytes, and 512 bytes a token.
        taken = -(-tokens // (64 * splits)) * 64 + 3 * 64 + (256 if splits > 1 else 0)
        # Neighbours on a processor cost nothing, or all of their work.
        return played(programs * splits, 2 * taken, 264) + played(programs * splits, taken, 132)

    most = max(1, min(tokens // waves.LEAST_TOKENS, 4 * 264 // programs))
    assert ends(splits) == pytest.approx(min(ends(other) for other in range(1, most + 1)))


def test_layers_of_7b_fill_the_device() -> None:
    """Density 0.1 of 4096 x 4096 and 11008 x 4096, 16,384 tokens: 102 and 275 programs for 264 places."""
    tile = default_tile(WEIGHT_GRADIENT, 128, BF16)
    for programs, splits, share in ((102, 5, 0.96), (275, 3, 0.78)):
        assert waves.best_splits(tile, BF16, programs, 16384, H100) == splits
        assert programs * splits / (-(-programs * splits // 264) * 264) > share


def test_programs_that_find_work() -> None:
    """About as many as there are chunks of two blocks in block rows of random length."""
    torch.manual_seed(3)
    counts = (torch.rand(100, 25) < 0.1).sum(1)
    tile = Tile(64, 128, 64, warps=4, stages=3)
    expected = int(((counts + 1) // 2).sum())
    found = gpu.working_programs(tile, 64, 100, int(counts.sum()))
    assert abs(found - expected) <= 10 and found <= gpu.gradient_programs(tile, 64, 100, int(counts.sum()))
    assert gpu.working_programs(tile, 128, 100, 7) == 14
