"""The file of tuned tiles: what is kept, what is used, and what becomes of a file that is damaged or foreign."""

from __future__ import annotations

import json
import multiprocessing
import warnings

import pytest
import torch

from megasparse.kernels.block_sparse import tile_cache, tuning
from megasparse.kernels.block_sparse.tiles import (
    FORWARD,
    INPUT_GRADIENT,
    WEIGHT_GRADIENT,
    Tile,
    candidates,
    default_tile,
    fits,
    fitted,
)

PROBLEM = tile_cache.Problem(FORWARD, "some GPU", torch.bfloat16, 64, 4096, 32, 96)
TILE = Tile(64, 64, 32, warps=4, stages=2)


def forget() -> None:
    tile_cache._stored.cache_clear()
    tile_cache._tile.cache_clear()


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    monkeypatch.setenv("MEGASPARSE_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / tile_cache.FILE_NAME
    forget()


def test_default_until_tuned() -> None:
    assert tile_cache.tile_for(PROBLEM) == default_tile(FORWARD, 64, torch.bfloat16)
    tile_cache.store({PROBLEM.key: TILE})
    assert tile_cache.tile_for(PROBLEM) == TILE
    # What is stored holds for neighbouring sizes, and for nothing else.
    change = {**vars(PROBLEM)}
    assert tile_cache.tile_for(tile_cache.Problem(**{**change, "tokens": 4000, "num_active": 100})) == TILE
    others = {
        "kernel": INPUT_GRADIENT,
        "device": "another GPU",
        "dtype": torch.float16,
        "block_size": 128,
        "tokens": 5000,
    }
    for name, value in {**others, "groups": 64, "num_active": 500}.items():
        assert tile_cache.tile_for(tile_cache.Problem(**{**change, name: value})) != TILE, name


def test_tune_keeps_the_fastest_that_runs() -> None:
    class OutOfResources(Exception):
        """Named as Triton's."""

    slow, refused, fast = list(candidates(FORWARD, 64, torch.bfloat16))[:3]
    times = {slow: 2.0, fast: 1.0}

    def run(tile: Tile) -> Tile:
        if tile == refused:
            raise OutOfResources("shared memory")
        return tile

    assert tuning.tune(PROBLEM, run, lambda call: times.get(call(), 3.0)) == (fast, 1.0)
    assert tile_cache.tile_for(PROBLEM) == fast
    with pytest.raises(ZeroDivisionError):
        tuning.tune(PROBLEM, lambda tile: 1 / 0, lambda call: call())


def test_limit_of_candidates() -> None:
    tried = []
    tuning.tune(PROBLEM, tried.append, lambda call: call() or 1.0, limit=4)
    assert len(tried) == 4 and tried[0] == default_tile(FORWARD, 64, torch.bfloat16)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1]",
        '{"format": "another"}',
        f'{{"format": "{tile_cache.FORMAT}"}}',
        f'{{"format": "{tile_cache.FORMAT}", "tiles": {{"a": {{"rows": 64}}}}}}',
        f'{{"format": "{tile_cache.FORMAT}", "tiles": []}}',
        json.dumps({"format": tile_cache.FORMAT, "tiles": {PROBLEM.key: {**vars(TILE), "rows": 48}}}),
        json.dumps({"format": tile_cache.FORMAT, "tiles": {PROBLEM.key: {**vars(TILE), "warps": "4"}}}),
        "\x00\xff",
    ],
)
def test_damaged_or_foreign_file_is_ignored_with_a_warning(path, text) -> None:
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="triton_tiles.json: ignored"):
        assert tile_cache.tile_for(PROBLEM) == default_tile(FORWARD, 64, torch.bfloat16)
    # Told once, not in every step; and the next tuning makes the file whole.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tile_cache.tile_for(PROBLEM)
    with pytest.warns(UserWarning, match="ignored"):
        tile_cache.store({PROBLEM.key: TILE})
    assert tile_cache.tile_for(PROBLEM) == TILE


def test_stored_tile_that_does_not_fit_is_not_used() -> None:
    tile_cache.store({PROBLEM.key: Tile(64, 128, 32, warps=4, stages=2)})
    assert tile_cache.tile_for(PROBLEM) == default_tile(FORWARD, 64, torch.bfloat16)


def _store_many(name: str) -> None:
    for number in range(10):
        tile_cache.store({f"{name} {number}": TILE})


def test_processes_that_store_at_once_lose_nothing(path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store_many, args=(name,)) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert set(tile_cache.load(path)) == {f"{name} {number}" for name in "ab" for number in range(10)}
    assert sorted(file.name for file in path.parent.iterdir()) == ["triton_tiles.json", "triton_tiles.lock"]


@pytest.mark.parametrize("is_hip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("kernel", [FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT])
def test_every_candidate_can_be_used(kernel, block_size, dtype, is_hip) -> None:
    tiles = list(candidates(kernel, block_size, dtype, is_hip))
    assert tiles[0] == default_tile(kernel, block_size, dtype, is_hip)
    # Each costs a second of compilation, and more.
    assert 4 <= len(tiles) == len(set(tiles)) <= 48
    for tile in tiles:
        assert fits(tile, kernel, block_size)
        for tokens, active in ((1, 0.1), (20, 1.6), (5000, 50.0)):
            small = fitted(tile, kernel, block_size, tokens, active)
            assert fits(small, kernel, block_size) and small.rows <= tile.rows and small.columns <= tile.columns


@pytest.mark.parametrize("change", [{"rows": 48}, {"depth": 8}, {"warps": 3}, {"stages": 0}, {"columns": 64.0}])
def test_impossible_tile(change) -> None:
    with pytest.raises(ValueError, match=f"tile: {next(iter(change))} = .*must be"):
        Tile(**{**vars(TILE), **change})
