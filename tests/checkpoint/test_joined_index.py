"""Checkpoints of many ranks: the index is a tree of files, from which each rank reads what it needs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint import reader
from megasparse.checkpoint.index import Index, SavedParameter, read_index
from megasparse.checkpoint.joined import file_name, members, merged_runs, ranks_of, top_stride
from megasparse.checkpoint.order import Run, split
from megasparse.checkpoint.reader import Checkpoint, damage, index_damage, is_good
from megasparse.checkpoint.store import CheckpointError, CheckpointStore
from megasparse.checkpoint.writing import RankTensors, commit, join_parts, write_part
from megasparse.conversion.inspection.verification import _bad_checkpoint
from megasparse.parallel import ShardSpec

SHAPES = {"rows": ((60, 24), 0), "columns": ((36, 48), 1), "same": ((70,), None)}
SIZE = 2
"""Tensor-parallel ranks that write."""


def spec_of(name: str, size: int) -> ShardSpec:
    shape, dim = SHAPES[name]
    return ShardSpec(shape, dim, size if dim is not None else 1)


def whole(name: str) -> torch.Tensor:
    return torch.randn(SHAPES[name][0], generator=torch.Generator().manual_seed(len(name)))


def content(rank: int, world_size: int) -> RankTensors:
    """What a rank holds at ZeRO stage 3."""
    data_rank, tensor_rank = divmod(rank, SIZE)
    tensors, runs = {"window/loss": torch.tensor([float(rank)], dtype=torch.float64)}, {}
    for name in SHAPES:
        spec = spec_of(name, SIZE)
        shard = spec.shard(whole(name), tensor_rank).reshape(-1)
        share = -(-len(shard) // (world_size // SIZE))
        own = shard[data_rank * share : (data_rank + 1) * share]
        if len(own) and (spec.is_divided or tensor_rank == 0):
            pieces = split(spec, tensor_rank, data_rank * share, own, 12 if name == "columns" else 1)
            tensors[f"fp32/{name}"] = torch.cat([entries for _, entries in pieces])
            runs[f"fp32/{name}"] = [run for run, _ in pieces]
    if rank == 0:
        tensors["method/topology/active/x"] = torch.tensor([3, 5], dtype=torch.uint8)
    return RankTensors(tensors, runs)


def save(folder: Path, world_size: int, group_files: int) -> Path:
    store = CheckpointStore(folder, keep=2)
    partial = store.begin(7)
    for rank in range(world_size):
        write_part(partial, rank, content(rank, world_size))
    # The first of a group waits for the others: here they have been before.
    for rank in reversed(range(world_size)):
        join_parts(partial, rank, world_size, 5, group_files=group_files)
    bands = {"columns": 12}
    parameters = {name: SavedParameter(shape, bands.get(name, 1)) for name, (shape, _) in SHAPES.items()}
    index = Index(7, {}, 7, {}, [0.5], {}, {"world_size": world_size}, parameters)
    return commit(store, index, world_size, 5, group_files=group_files)


@pytest.mark.parametrize(("world_size", "group_files"), [(6, 32), (6, 2), (10, 3), (22, 2), (18, 3), (28, 3)])
def test_every_layout_finds_its_entries(tmp_path: Path, world_size: int, group_files: int) -> None:
    folder, chance = save(tmp_path, world_size, group_files), random.Random(world_size)
    with Checkpoint(folder) as saved:
        assert len(saved.index.files) <= group_files
        for name in SHAPES:
            assert torch.equal(saved.tensor(name, "fp32"), whole(name)) and saved.kinds(name) == ["fp32"]
            for size in (1, 2, 4):
                spec = spec_of(name, size)
                for rank in range(spec.size):
                    shard = spec.shard(whole(name), rank).reshape(-1)
                    start, stop = sorted(chance.choices(range(len(shard) + 1), k=2))
                    read = saved.fragment(name, "fp32", spec, rank, start, stop - start)
                    assert torch.equal(read, shard[start:stop])
        for rank in range(world_size):
            assert saved.own_tensor(rank, "window/loss").tolist() == [rank]
            assert saved.own_tensor(rank, "window/nothing") is None
        assert saved.own_tensor(world_size, "window/loss") is None and saved.random_state(0) is None
        assert saved.topology()["active/x"].tolist() == [3, 5]
        assert [name for name, _ in saved.files()] == [file_name(rank) for rank in range(world_size)]
        saved.check_all()
    assert is_good(folder) and damage(folder) is None and not list(_bad_checkpoint(folder))
    # Nothing is left of the parts, and few enough files of the first kind keep the format of before.
    text = json.loads((folder / "index.json").read_text())
    assert text["format"] == (2 if world_size <= group_files else 3)
    assert not list(folder.glob("*.part*"))


def test_a_rank_reads_a_few_files_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, opened, listed = save(tmp_path, 64, 2), [], []
    monkeypatch.setattr(reader, "RankFile", noting(reader.RankFile, opened))
    monkeypatch.setattr(reader, "read_joined", noting(reader.read_joined, listed))
    with Checkpoint(folder) as saved:
        # Of tensor-parallel rank 1, the piece of data-parallel rank 20 of 32.
        spec, share = spec_of("rows", 2), -(-720 // 32)
        piece = saved.fragment("rows", "fp32", spec, 1, 20 * share, share)
        assert torch.equal(piece, spec.shard(whole("rows"), 1).reshape(-1)[20 * share :][:share])
    assert [path.name for path in opened] == [file_name(41)]
    assert [path.name for path in listed] == [
        file_name(32, 64),
        file_name(32, 48),
        file_name(40, 48),
        file_name(40, 44),
        file_name(40, 42),
    ]


def noting(function: Callable, paths: list) -> Callable:
    def noted(path, *rest):
        paths.append(path)
        return function(path, *rest)

    return noted


@pytest.mark.parametrize(
    ("name", "at_once", "message"),
    [
        (file_name(0, 9), True, "ranks-00000-00008.json is missing"),
        (file_name(3, 6), False, "ranks-00003-00005.json is missing"),
        (file_name(4), False, "rank-00004.safetensors is missing"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, at_once: bool, message: str) -> None:
    folder = save(tmp_path, 18, 3)
    (folder / name).unlink()
    assert message in damage(folder) and (index_damage(folder) is not None) == at_once
    with pytest.raises(CheckpointError, match=message), Checkpoint(folder) as saved:
        saved.tensor("rows", "fp32")
    assert any(message in problem.reason for problem in _bad_checkpoint(folder))


@pytest.mark.parametrize("name", [file_name(0, 9), file_name(3, 6), file_name(4)])
def test_any_byte_that_was_changed_is_found(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, 18, 3)
    path, chance = folder / name, random.Random(name)
    before = path.read_bytes()
    for _ in range(20):
        changed, at = bytearray(before), chance.randrange(len(before))
        changed[at] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=name), Checkpoint(folder) as saved:
            saved.check_all()
        assert list(_bad_checkpoint(folder))
    path.write_bytes(before[:-1])
    assert f"{name} has {len(before) - 1} bytes instead of {len(before)}" in damage(folder)


def test_who_cannot_write_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    partial = store.begin(7)
    for rank in (0, 1, 2, 3, 5):
        write_part(partial, rank, content(rank, 6))
    with pytest.raises(CheckpointError, match="rank 4: no room"):
        join_parts(partial, 4, 6, 5, {4: "no room"}.get, group_files=2)
    with pytest.raises(CheckpointError, match="rank 4 has written nothing within 0.1 seconds"):
        join_parts(partial, 4, 6, 0.1, group_files=2)
    for rank in (2, 0):
        join_parts(partial, rank, 6, 5, group_files=2)
    index = Index(7, {}, 7, {}, [], {}, {}, {})
    with pytest.raises(CheckpointError, match="rank 4: rank 5: no room"):
        commit(store, index, 6, 5, {4: "rank 5: no room"}.get, group_files=2)
    assert store.folders() == []


def test_names_and_levels() -> None:
    assert [top_stride(size) for size in (1, 32, 33, 1024, 1025, 16384)] == [1, 1, 32, 32, 1024, 1024]
    assert members(0, 5, 1) == {file_name(rank): rank for rank in range(5)}
    assert members(0, 70, 32) == {file_name(0, 32): 0, file_name(32, 64): 32, file_name(64, 70): 64}
    assert ranks_of(file_name(12)) == range(12, 13) and ranks_of(file_name(32, 64)) == range(32, 64)
    assert list(ranks_of("weights.safetensors")) == []


def test_neighbours_become_one_run_and_what_overlaps_does_not(tmp_path: Path) -> None:
    index = read_index(save(tmp_path, 6, 2))
    assert {key: runs for file in [merged_runs(index.files.values())] for key, runs in file.items()} == {
        "fp32/rows": [Run(0, 1440)],
        "fp32/columns": [Run(0, 1728)],
        "fp32/same": [Run(0, 70)],
    }
    first = next(iter(index.files.values()))
    assert len(merged_runs([first, first])["fp32/rows"]) == 2 * len(first.runs["fp32/rows"])
