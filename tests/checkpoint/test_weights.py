"""Weights from checkpoint folders: what comes back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from saved_files import FILE, MODEL, NORM, TABLE, SmallState, parameters, write_good

from megasparse.checkpoint.index import INDEX, read_index
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import find_checkpoint, load_model_weights, passed_over


def test_weights_come_back_in_float32_and_the_newest_good_checkpoint_is_found(tmp_path: Path) -> None:
    write_good(tmp_path, 5)
    newest = write_good(tmp_path, 12, seed=1)
    folder, index = find_checkpoint(tmp_path)
    assert folder == newest and index.step == 12 and passed_over(tmp_path) == []
    assert find_checkpoint(tmp_path, 5)[1].step == 5
    found, expected = load_model_weights(folder), parameters(1)
    assert set(found) == {*expected, "head.weight"} and found["head.weight"] is found[TABLE]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_everything_of_a_saved_state_comes_back(tmp_path: Path) -> None:
    state = SmallState(3)
    with Checkpoint(write_good(tmp_path)) as saved:
        assert saved.step == 3 and saved.shapes == state.shapes and saved.facts == state.facts
        assert saved.index.model == MODEL and saved.loss_scaler() == {"cur_scale": 8.0}
        for name in (TABLE, NORM):
            assert saved.kinds(name) == state.kinds(name)
            for kind in saved.kinds(name):
                found = saved.tensor(name, kind)
                assert torch.equal(found, state.tensor(name, kind)) and found.dtype == state.tensor(name, kind).dtype
        assert {key: bits.tolist() for key, bits in saved.topology().items()} == {"active/head": [3]}
        assert saved.method_state("other") == {} and saved.random_state(0) is None
        saved.check_all()


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    with Checkpoint(write_good(tmp_path, 0)) as saved:
        assert saved.step == 0 and saved.kinds(TABLE) == ["fp32"]


def test_missing_steps_and_unfinished_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no good checkpoint$"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="must be none"):
        find_checkpoint(tmp_path, 3)
    (write_good(tmp_path) / INDEX).unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint: .*index.json is missing, so it was never finished"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="must be 3"):
        find_checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match="index.json is missing"):
        find_checkpoint(tmp_path, 3)


def test_a_checkpoint_of_the_first_format_is_refused_with_a_sentence(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    (folder / INDEX).rename(folder / "manifest.json")
    with pytest.raises(CheckpointError, match="was written by an early version, in DeepSpeed's files; must be"):
        read_index(folder)


@pytest.mark.parametrize("name", [INDEX, FILE])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    """All bytes of the small files, one after another; a bit of each."""
    folder = write_good(tmp_path)
    good = (folder / name).read_bytes()
    for at in range(len(good)):
        (folder / name).write_bytes(good[:at] + bytes([good[at] ^ (1 << at % 8)]) + good[at + 1 :])
        with pytest.raises(CheckpointError, match=name), Checkpoint(folder) as saved:
            saved.check_all()
    (folder / name).write_bytes(good)
    with Checkpoint(folder) as saved:
        saved.check_all()


@pytest.mark.parametrize("name", [INDEX, FILE])
def test_files_that_are_cut_off_or_of_another_checkpoint_are_found(tmp_path: Path, name: str) -> None:
    folder, other = write_good(tmp_path / "a", 3), write_good(tmp_path / "b", 3, seed=1)
    good = (folder / name).read_bytes()
    assert len((other / name).read_bytes()) == len(good)
    # The index ends with a line break, which says nothing.
    for content in (good[:-2], good[: len(good) // 2], b"", bytes(len(good)), (other / name).read_bytes()):
        (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{FILE}|{INDEX}"), Checkpoint(folder) as saved:
            saved.check_all()


def test_an_index_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    folder = write_good(tmp_path)
    text = (folder / INDEX).read_text().replace(FILE, "../" + FILE)
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError):
        read_index(folder)


def test_the_index_is_json_that_people_can_read(tmp_path: Path) -> None:
    values = json.loads((write_good(tmp_path) / INDEX).read_text())
    assert values["format"] == 2 and values["content"]["step"] == 3
    assert values["content"]["parameters"][NORM] == {"shape": [4], "bands": 1}
