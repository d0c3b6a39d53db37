"""The saved order of parameters against shards and flat fragments of the whole tensor, on random cuts."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from megasparse.checkpoint.order import FragmentOrder, band_count, split
from megasparse.parallel import ShardSpec

SPECS = [
    ((7,), None, ()),
    ((12, 5), None, ()),
    ((24,), 0, ()),
    ((24, 5), 0, ()),
    ((36, 4), 0, (12, 12, 12)),
    ((48, 3), 0, (24, 12, 12)),
    ((24,), 0, (12, 12)),
    ((5, 24), 1, ()),
    ((1, 12), 1, ()),
    ((9, 120), 1, ()),
    ((3, 60), 1, ()),
]


def cuts(chance: random.Random, numel: int, pieces: int) -> list[tuple[int, int]]:
    """Consecutive ranges that cover [0, numel); some may be empty."""
    edges = [0, *sorted(chance.randint(0, numel) for _ in range(pieces - 1)), numel]
    return list(zip(edges, edges[1:], strict=False))


def saved(spec: ShardSpec, whole: torch.Tensor, chance: random.Random, bands: int) -> torch.Tensor:
    """All entries in the saved order, from fragments; every place is written exactly once."""
    order, written = torch.zeros(whole.numel()), torch.zeros(whole.numel(), dtype=torch.int64)
    for rank in range(spec.size if spec.is_divided else 1):
        shard = spec.shard(whole, rank).reshape(-1)
        for start, end in cuts(chance, shard.numel(), 3):
            for run, entries in split(spec, rank, start, shard[start:end], bands):
                order[run.start : run.end] = entries
                written[run.start : run.end] += 1
    assert (written == 1).all()
    return order


@pytest.mark.parametrize("writers", [1, 2, 3, 4])
@pytest.mark.parametrize(("shape", "dim", "parts"), SPECS)
def test_any_layout_finds_its_fragments(shape, dim, parts, writers: int) -> None:
    chance, whole = random.Random(prod(shape) * writers), torch.randn(shape)
    written = ShardSpec(shape, dim, writers, parts)
    bands = band_count(written)
    order = saved(written, whole, chance, bands)
    for readers in (1, 2, 3, 4, 6):
        spec = ShardSpec(shape, dim, readers, parts)
        for rank in range(readers):
            shard = spec.shard(whole, rank).reshape(-1)
            for start, end in cuts(chance, shard.numel(), 4):
                read = FragmentOrder(spec, rank, start, end - start, bands)
                found = read.assemble([order[run.start : run.end] for run in read.runs])
                assert torch.equal(found, shard[start:end]), (spec, rank, start, end)


def test_one_rank_and_many_save_the_same_order() -> None:
    whole, chance = torch.randn(9, 120), random.Random(1)
    orders = [saved(ShardSpec((9, 120), 1, size), whole, chance, 24) for size in (1, 2, 4, 8)]
    assert all(torch.equal(orders[0], order) for order in orders)


def test_ranks_that_do_not_divide_the_bands_read_whole_bands() -> None:
    """Saved by one rank in 24 bands of 5 columns; read by 5 ranks of 24 columns."""
    whole = torch.randn(7, 120)
    bands = band_count(ShardSpec((7, 120), 1, 1))
    assert bands == 24
    order = saved(ShardSpec((7, 120), 1, 1), whole, random.Random(2), bands)
    spec = ShardSpec((7, 120), 1, 5)
    for rank in range(5):
        read = FragmentOrder(spec, rank, 10, 100, bands)
        found = read.assemble([order[run.start : run.end] for run in read.runs])
        assert torch.equal(found, spec.shard(whole, rank).reshape(-1)[10:110])


def test_a_fragment_is_a_run_for_each_band_or_part() -> None:
    columns = FragmentOrder(ShardSpec((4096, 768), 1, 4), 1, 0, 2048 * 192, 48)
    assert len(columns.runs) == 12 and sum(run.numel for run in columns.runs) == 2048 * 192
    fused = FragmentOrder(ShardSpec((2304, 768), 0, 4, (768, 768, 768)), 1, 0, 576 * 768, 1)
    assert len(fused.runs) == 3 and sum(run.numel for run in fused.runs) == 576 * 768
