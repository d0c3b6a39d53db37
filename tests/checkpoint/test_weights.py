"""Weights from checkpoint folders: what comes back, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.checkpoint.store import TOPOLOGY, CheckpointError, CheckpointStore, Manifest
from megasparse.checkpoint.weights import MODEL_STATES, find_checkpoint, load_model_weights


class Intruder:
    """Would make a folder if it were unpickled as plain pickle does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def write(run_folder: Path, step: int, content: Any) -> Path:
    store = CheckpointStore(run_folder / "checkpoints", keep=9)
    partial = store.folder / store.begin(step)
    torch.save(content, partial / MODEL_STATES)
    (partial / TOPOLOGY).write_bytes(b"")
    return store.commit(Manifest(step=step, world_size=1, zero_stage=1, model={}))


def test_weights_come_back_in_float32_and_the_newest_good_checkpoint_is_found(tmp_path: Path) -> None:
    weight, index = torch.randn(3, 4).to(torch.bfloat16), torch.arange(3)
    write(tmp_path, 5, {"module": {"weight": weight}})
    newest = write(tmp_path, 12, {"module": {"weight": weight, "index": index}})
    folder, manifest = find_checkpoint(tmp_path)
    assert folder == newest and manifest.step == 12
    assert find_checkpoint(tmp_path, 5)[1].step == 5
    found = load_model_weights(folder)
    assert found["weight"].dtype == torch.float32 and torch.equal(found["weight"], weight.float())
    assert torch.equal(found["index"], index) and found["index"].dtype == torch.int64


def test_a_file_that_holds_more_than_data_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, {"module": Intruder(tmp_path / "broken-in")})
    with pytest.raises(CheckpointError, match="not a readable checkpoint file"):
        load_model_weights(folder)
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("content", [{"optimizer": 3}, {"module": [1]}, {"module": {"weight": 1}}, 7])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="no weights under the key `module`"):
        load_model_weights(write(tmp_path, 1, content))


def test_missing_steps_and_unfinished_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no good checkpoint$"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="legal values: none"):
        find_checkpoint(tmp_path, 3)
    (write(tmp_path, 3, {}) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint: .*manifest.json is missing"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="manifest.json is missing"):
        find_checkpoint(tmp_path, 3)
