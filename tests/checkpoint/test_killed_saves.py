"""Savers that are killed at random moments: what was committed is whole, and nothing that was committed is lost."""

from __future__ import annotations

import multiprocessing
import random
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from megasparse.checkpoint.index import Index, SavedParameter
from megasparse.checkpoint.order import split
from megasparse.checkpoint.reader import Checkpoint, is_good
from megasparse.checkpoint.store import CheckpointStore
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.checkpoint.writing import RankTensors, commit, write_part
from megasparse.parallel import ShardSpec

SHAPE = (96, 480)


def content(rank: int, step: int) -> RankTensors:
    """The shard of one of two tensor-parallel ranks of a matrix whose entries tell the step."""
    spec = ShardSpec(SHAPE, 1, 2)
    whole = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE) + step
    pieces = split(spec, rank, 0, spec.shard(whole, rank).reshape(-1), 48)
    return RankTensors(
        {"fp32/weight": torch.cat([entries for _, entries in pieces])}, {"fp32/weight": [run for run, _ in pieces]}
    )


def save(store: CheckpointStore, step: int) -> None:
    """As two ranks do it, each in a thread."""
    partial = store.begin(step)
    other = threading.Thread(target=write_part, args=(partial, 1, content(1, step)))
    other.start()
    write_part(partial, 0, content(0, step))
    commit(store, Index(step, {}, step, {}, [], {}, {}, {"weight": SavedParameter(SHAPE, 48)}), 2, timeout=60)
    other.join()


def save_for_ever(folder: Path, first: int, told: Connection) -> None:
    store = CheckpointStore(folder, keep=2)
    for step in range(first, first + 10**6):
        save(store, step)
        told.send(step)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tries", [10, pytest.param(50, marks=pytest.mark.exhaustive)])
def test_a_killed_saver_loses_nothing_that_was_committed(tmp_path: Path, tries: int) -> None:
    chance, context = random.Random(0), multiprocessing.get_context("forkserver")
    # Imports take seconds: once is enough.
    context.set_forkserver_preload(["megasparse.checkpoint.writing"])
    folder, newest = tmp_path / "checkpoints", 0
    for _ in range(tries):
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(folder, newest + 1, its), daemon=True)
        process.start()
        its.close()
        assert mine.poll(120)
        newest = mine.recv()
        time.sleep(chance.uniform(0, 0.06))
        process.kill()
        process.join()
        while mine.poll():
            try:
                newest = mine.recv()
            except EOFError:
                break
        found, index = find_checkpoint(tmp_path)
        # One more may have been committed before it was told.
        assert index.step in (newest, newest + 1)
        newest = index.step
        with Checkpoint(found) as saved:
            saved.check_all()
            assert float(saved.tensor("weight", "fp32")[0, 0]) == newest
        assert all(is_good(path) for path in CheckpointStore(folder, keep=2).folders())
    save(CheckpointStore(folder, keep=2), newest + 1)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{newest + at:08d}" for at in (0, 1)]


def test_two_hundred_saves_leave_no_threads_descriptors_or_files(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    save(store, 1)
    threads, descriptors = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for step in range(2, 202):
        save(store, step)
        with Checkpoint(store.folders()[0]) as saved:
            saved.check_all()
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000200", "step-00000201"]


def test_a_rank_that_cannot_write_is_named_and_nothing_appears(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    save(store, 1)
    partial, bad = store.begin(2), content(1, 2)
    bad.tensors["fp32/weight"][5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        write_part(partial, 1, bad)
    write_part(partial, 0, content(0, 2))
    index = Index(2, {}, 2, {}, [], {}, {}, {"weight": SavedParameter(SHAPE, 48)})
    with pytest.raises(ValueError, match="rank 1: no room"):
        commit(store, index, 2, timeout=60, failure_of={1: "no room"}.get)
    assert [path.name for path in store.folders()] == ["step-00000001"]
    store.begin(3)
    with pytest.raises(ValueError, match="rank 0 has written nothing within 0.1 seconds"):
        commit(store, Index(3, {}, 3, {}, [], {}, {}, {}), 1, timeout=0.1)
