"""Checkpoint folders: whole or not at all, whatever happens to their files and whatever lies beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved_files import FILE, MODEL, SmallState, write_good
from small_files import files_of_at_most

from megasparse.checkpoint.index import INDEX
from megasparse.checkpoint.order import Run
from megasparse.checkpoint.reader import damage, is_good
from megasparse.checkpoint.store import CheckpointError, CheckpointStore, check_model
from megasparse.checkpoint.writing import RankTensors, write_checkpoint, write_part


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def store_of(run: Path, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(run / "checkpoints", keep)


def test_nothing_there_is_no_error(tmp_path) -> None:
    assert store_of(tmp_path).folders() == []


def test_the_newest_are_kept_and_old_ones_go(tmp_path) -> None:
    for step in (5, 20, 100, 1000, 9):
        write_good(tmp_path, step, keep=3)
    # Step 9 was asked for last, so it stays although higher steps are there.
    assert names(tmp_path) == ["step-00000009", "step-00000020", "step-00000100", "step-00001000"]
    assert [folder.name for folder in store_of(tmp_path).folders()] == names(tmp_path)[::-1]


def test_the_same_step_can_be_saved_again(tmp_path) -> None:
    write_good(tmp_path, 5)
    before = (tmp_path / "checkpoints" / "step-00000005" / FILE).read_bytes()
    write_good(tmp_path, 5, seed=1)
    assert names(tmp_path) == ["step-00000005"]
    assert (tmp_path / "checkpoints" / "step-00000005" / FILE).read_bytes() != before


def test_damaged_folders_do_not_crowd_out_good_ones(tmp_path) -> None:
    """A run that goes on from step 20, because 30 is cut off, must keep what it saves from then on."""
    write_good(tmp_path, 20, keep=1)
    bad = write_good(tmp_path, 30, keep=9)
    (bad / FILE).write_bytes((bad / FILE).read_bytes()[:-1])
    assert not is_good(bad) and "bytes instead of" in damage(bad)
    write_good(tmp_path, 25, keep=1)
    assert names(tmp_path) == ["step-00000025", "step-00000030"]


@pytest.mark.parametrize("has_target", [True, False])
def test_a_link_in_the_place_of_a_checkpoint_is_not_followed(tmp_path, has_target) -> None:
    write_good(tmp_path, 10)
    if has_target:
        (tmp_path / "target").mkdir()
    (tmp_path / "checkpoints" / "step-00000020").symlink_to(tmp_path / "target")
    with pytest.raises(CheckpointError, match="step-00000020 is in the way: it is no folder"):
        write_good(tmp_path, 20)
    assert not has_target or not list((tmp_path / "target").iterdir())
    write_good(tmp_path, 30)
    assert names(tmp_path) == ["step-00000010", "step-00000020", "step-00000030"]


def test_no_run_folder_is_made_anew(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        store_of(tmp_path / "deleted").begin(10)
    assert not (tmp_path / "deleted").exists()


@pytest.mark.parametrize("limit", [0, 20, 2000])
def test_a_rank_without_room_leaves_nothing(tmp_path, limit) -> None:
    store, content = store_of(tmp_path), RankTensors({"fp32/a": torch.ones(5000)}, {"fp32/a": [Run(0, 5000)]})
    partial = store.begin(10)
    with files_of_at_most(limit), pytest.raises(OSError, match="File too large"):
        write_part(partial, 0, content)
    assert list(partial.iterdir()) == []


def test_left_overs_of_interrupted_saves_are_no_checkpoints_and_go(tmp_path) -> None:
    good, store = write_good(tmp_path, 10), store_of(tmp_path)
    for step in (20, 30):
        (store.begin(step) / FILE).write_bytes(b"half")
    assert not store.partial(20).exists() and store.folders() == [good]
    write_good(tmp_path, 40)
    assert names(tmp_path) == ["step-00000010", "step-00000040"]


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path) -> None:
    write_good(tmp_path, 6, keep=1)
    folder = tmp_path / "checkpoints"
    (tmp_path / "elsewhere").mkdir()
    for name in ("step-00000006-best", "step-00000030.bak", "step-best", "partial-step-x"):
        (folder / name).mkdir()
    (folder / "step-00000099").symlink_to(tmp_path / "elsewhere")
    (folder / "step-00000098").write_text("a file")
    (folder / "step-00000002.tar").write_text("a file")
    before = set(names(tmp_path)) - {"step-00000006"}
    write_good(tmp_path, 7, keep=1)
    write_good(tmp_path, 8, keep=1)
    assert set(names(tmp_path)) == before | {"step-00000008"}
    assert [path.name for path in store_of(tmp_path).folders()] == ["step-00000008"]


def test_a_failed_save_leaves_nothing(tmp_path) -> None:
    class Broken(Exception):
        pass

    state = SmallState(3)
    write_good(tmp_path, 2)

    def broken(name: str, kind: str):
        raise Broken

    state.tensor = broken
    with pytest.raises(Broken):
        write_checkpoint(state, tmp_path)
    assert names(tmp_path) == ["step-00000002"]


def test_misfits_name_every_field(tmp_path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_model(tmp_path, MODEL, {**MODEL, "hidden_size": 128, "activation": "gelu"})
    for part in (
        str(tmp_path), "model.hidden_size is 4 there and 128 here", "model.activation is None there and 'gelu' here",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert "tie_embeddings" not in str(caught.value)


def test_the_index_comes_last(tmp_path) -> None:
    """Without it nothing is a checkpoint, so everything else must have reached the disk before."""
    folder = write_good(tmp_path, 10)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(times) == {FILE, INDEX} and times[INDEX] >= times[FILE]
