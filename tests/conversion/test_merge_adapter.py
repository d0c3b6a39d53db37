"""An adapter on disk, and in the model that it was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tool_calls import call

from megasparse.checkpoint.adapter_file import ADAPTER, Adaptation, folder_digest, read_adapter, write_adapter
from megasparse.checkpoint.model_folder import ModelFolder, ModelFolderWriter
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import load_config
from megasparse.models.build import build_model

MODEL = [
    "sparsity.algorithm=dense", "model.hidden_size=32", "model.ffn_hidden_size=72", "model.vocab_size=97",
    "model.tie_embeddings=true", "model.num_attention_heads=4", "model.num_layers=2",
]  # fmt: skip


def write_folder(folder: Path, words: list[str]) -> None:
    config = load_config([], words)
    weights = dict(build_model(config, 97).named_parameters())
    with ModelFolderWriter(folder, config, dict.fromkeys(weights, torch.float32)) as writer:
        for name in writer.names:
            writer.write(name, weights[name].detach()[: writer.specs[name].shape[0]])


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merge") / "base"
    write_folder(folder, MODEL)
    return folder


def some_adapter(base: Path, unit: int) -> Adaptation:
    """Of a matrix whose widths the unit does not divide, one that it does divide, and one without chosen units."""
    numbers = {
        "layers.0.mlp.up": torch.tensor([0, 7, 9]), "layers.1.attention.output": torch.tensor([2]),
        "layers.1.mlp.down": torch.tensor([], dtype=torch.int64),
    }  # fmt: skip
    values = {name: torch.randn(places.numel(), unit, unit) for name, places in numbers.items()}
    return Adaptation("smt", unit, folder_digest(ModelFolder(base)), numbers, values, {})


@pytest.mark.parametrize("unit", [1, 16])
def test_a_merged_model_differs_where_the_adapter_says_and_by_what(base: Path, tmp_path: Path, unit: int) -> None:
    adapter = some_adapter(base, unit)
    write_adapter(tmp_path / ADAPTER, adapter)
    again = read_adapter(tmp_path / ADAPTER)
    assert (again.method, again.unit, again.digest) == ("smt", unit, adapter.digest)
    status, text = call(
        "merge_adapter", "--model", base, "--adapter", tmp_path / ADAPTER, "--output", tmp_path / "merged"
    )
    assert status == 0 and f"{4 * unit**2:,} entries of 3 matrices" in text, text
    before, after = ModelFolder(base), ModelFolder(tmp_path / "merged")
    after.check_files()
    for name in before.names:
        expected, layer = before.tensor(name).clone(), name.removesuffix(".weight")
        if layer in adapter.numbers:
            across = -(-expected.shape[1] // unit)
            for number, values in zip(adapter.numbers[layer].tolist(), adapter.values[layer], strict=True):
                row, column = number // across * unit, number % across * unit
                place = expected[row : row + unit, column : column + unit]
                place += values[: place.shape[0], : place.shape[1]]
        assert torch.equal(after.tensor(name), expected), name


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / ADAPTER, some_adapter(base, 16))
    write_folder(tmp_path / "other", [*MODEL, "run.seed=5"])
    words = ("--adapter", tmp_path / ADAPTER, "--output", tmp_path / "merged")
    status, text = call("merge_adapter", "--model", tmp_path / "other", *words)
    assert status == 2 and "was trained on other weights" in text and not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="no adapter"):
        read_adapter(base / "model.safetensors")
