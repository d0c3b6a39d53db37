"""The saved order of parameters against shards and flat fragments of the whole tensor, on random cuts."""

from __future__ import annotations

import random
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.index import Index, SavedFile, SavedParameter, write_index
from megasparse.checkpoint.order import FragmentOrder, band_count, split
from megasparse.checkpoint.rank_file import write_rank_file
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.tensor_files import TensorSpec
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


# Fused queries, keys and values; output projection; both matrices of the MLP.
BLOCK = [((2304, 768), 0, (768,) * 3), ((768, 768), 1, ()), ((3072, 768), 0, ()), ((768, 3072), 1, ())]
LAYOUTS = [(data, tensor) for data in (1, 2, 4) for tensor in (1, 2, 4) if data * tensor <= 4]


@pytest.mark.parametrize(("data", "tensor"), LAYOUTS)
def test_another_layout_reads_little_more_than_it_keeps(tmp_path, data: int, tensor: int) -> None:
    """A block of GPT-2 small, written by `data` ranks for each of `tensor` shards, read for any other division: blocks
    that are read whole for their checksums cost less than a tenth."""
    matrices = [torch.randn(shape) for shape, _, _ in BLOCK]
    for number, (whole, (shape, dim, parts)) in enumerate(zip(matrices, BLOCK, strict=True)):
        write_layout(tmp_path / str(number), whole, ShardSpec(shape, dim, tensor, parts), data)
    for readers, size in LAYOUTS:
        for rank, part in product(range(size), range(readers)):
            read = kept = 0
            for number, (whole, (shape, dim, parts)) in enumerate(zip(matrices, BLOCK, strict=True)):
                spec = ShardSpec(shape, dim, size, parts)
                shard = spec.shard(whole, rank).reshape(-1)
                start, end = (shard.numel() * at // readers for at in (part, part + 1))
                with Checkpoint(tmp_path / str(number)) as saved:
                    found = saved.fragment("weight", "fp32", spec, rank, start, end - start)
                    assert torch.equal(found, shard[start:end])
                    read, kept = read + saved.bytes_read, kept + found.nbytes
            assert read <= 1.1 * kept, f"{readers} x {size}: {read / kept:.3f}"


def write_layout(folder: Path, whole: torch.Tensor, spec: ShardSpec, data: int) -> None:
    """A checkpoint of one matrix, by `data` ranks for each shard."""
    folder.mkdir()
    bands, files = band_count(spec), {}
    for rank, number in product(range(spec.size), range(data)):
        shard = spec.shard(whole, rank).reshape(-1)
        start, end = (shard.numel() * at // data for at in (number, number + 1))
        pieces = split(spec, rank, start, shard[start:end], bands)
        entries, name = torch.cat([part for _, part in pieces]), f"rank-{rank * data + number:05d}.safetensors"
        specs = {"fp32/weight": TensorSpec(tuple(entries.shape), torch.float32)}
        part = write_rank_file(folder / name, specs, [("fp32/weight", entries)])
        files[name] = SavedFile(part, {"fp32/weight": [run for run, _ in pieces]})
    write_index(Index(1, {}, 1, {}, [], {}, {}, {"weight": SavedParameter(spec.shape, bands)}, {}, files), folder)
