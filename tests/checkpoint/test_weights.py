"""Weights from checkpoint folders: what comes back, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_files import MODEL_STATES, content, layout, parameters, write, write_good

from megasparse.checkpoint.layout import LAYOUT, read_layout
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import find_checkpoint, load_model_weights
from megasparse.parallel.shard_spec import ShardSpec


class Intruder:
    """Would make a folder if it were unpickled as plain pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_weights_come_back_in_float32_and_the_newest_good_checkpoint_is_found(tmp_path: Path) -> None:
    write_good(tmp_path, 5)
    newest = write_good(tmp_path, 12, seed=1)
    folder, manifest = find_checkpoint(tmp_path)
    assert folder == newest and manifest.step == 12
    assert find_checkpoint(tmp_path, 5)[1].step == 5
    found, expected = load_model_weights(folder), parameters(1)
    assert set(found) == {*expected, "head.weight"} and found["head.weight"] is found["table.weight"]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_file_that_holds_more_than_data_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, {MODEL_STATES: {"module": Intruder(tmp_path / "broken-in")}})
    with pytest.raises(CheckpointError, match="not a readable checkpoint file"):
        load_model_weights(folder)
    assert not (tmp_path / "broken-in").exists()


GOOD = content(parameters())
WITHOUT_A_NAME = {**GOOD, "module": {"table.weight": GOOD["module"]["table.weight"]}}
UNEQUAL_STEPS = {**GOOD, "optimizer": {"state": {**GOOD["optimizer"]["state"], 1: {"step": torch.tensor(2.0)}}}}
OTHER_SIZE = {**GOOD, "module": {**GOOD["module"], "norm.weight": torch.zeros(3)}}
SHORT_MOMENT = {**GOOD["optimizer"]["state"], 1: {**GOOD["optimizer"]["state"][1], "exp_avg": torch.zeros(3)}}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"optimizer": 3}, "files are of another kind"),
        (7, "files are of another kind"),
        ({**GOOD, "module": [1]}, "files are of another kind"),
        (WITHOUT_A_NAME, "norm.weight"),
        (UNEQUAL_STEPS, r"optimizer steps differ: \[2, 3\]"),
        (OTHER_SIZE, "hold 3 of 4 entries of norm.weight"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, bad: Any, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_model_weights(write(tmp_path, 3, {MODEL_STATES: bad}))


def test_a_moment_that_is_too_short_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, {MODEL_STATES: {**GOOD, "optimizer": {"state": SHORT_MOMENT}}})
    with pytest.raises(CheckpointError, match="a piece of exp_avg is not there"):
        CheckpointReader(folder).tensor("norm.weight", "exp_avg")


def test_a_checkpoint_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    reader = CheckpointReader(write_good(tmp_path, 0))
    assert reader.step == 0 and reader.kinds("table.weight") == ["fp32"]


def test_tensor_parallel_shards_are_put_together_part_by_part(tmp_path: Path) -> None:
    """Fused parts of unequal size along one dimension, shares of two ranks."""
    whole, partition = torch.arange(32.0).view(8, 4), ShardSpec((8, 4), 0, 2, (4, 2, 2))
    fields = {"parameters": {"qkv.weight": partition, "norm.weight": ShardSpec((4,))}, "aliases": {}}
    saved = layout(**fields, tensor_parallel_size=2, groups=[["qkv.weight", "norm.weight"]])
    files = {
        f"mp_rank_0{rank}_model_states.pt": {
            "module": {"qkv.weight": partition.shard(whole, rank), "norm.weight": torch.full((4,), float(rank))},
            "optimizer": {"state": {}},
        }
        for rank in (0, 1)
    }
    reader = CheckpointReader(write(tmp_path, 3, files, saved))
    assert torch.equal(reader.tensor("qkv.weight", "fp32"), whole)
    assert torch.equal(reader.tensor("norm.weight", "fp32"), torch.zeros(4))
    assert reader.copies_differ("norm.weight", "fp32") and not reader.copies_differ("qkv.weight", "fp32")


def test_missing_steps_and_unfinished_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no good checkpoint$"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="must be none"):
        find_checkpoint(tmp_path, 3)
    (write(tmp_path, 3, {}) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint: .*manifest.json is missing"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        find_checkpoint(tmp_path, 3)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "layout.json is missing"),
        ("{", "layout.json is not readable"),
        ("[]", "layout.json is not readable"),
        ('{"parameters": {"../../escape": {"shape": [1], "dim": null, "size": 1, "parts": []}}}', "is no name of a"),
        ('{"parameters": {"a": {"shape": [3], "dim": 0, "size": 2, "parts": []}}}', "layout.json is not readable"),
        ('{"parameters": {}}', "layout.json is not readable"),
    ],
)
def test_a_layout_that_says_nothing_is_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / LAYOUT).write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        read_layout(tmp_path)
