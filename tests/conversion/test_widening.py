"""A model made wider computes what it did, and all of its new weights learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_states import TinyState, dense_config, write_model
from tool_calls import call

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.models.build import build_model


def config_with(**model) -> RunConfig:
    values = dense_config().model_dump(mode="json")
    values["model"] |= {"normalization": "rmsnorm", "position_embedding": "rope", **model}
    return check_config(values)


def grow(folder: Path, hidden_size: int) -> tuple[int, str]:
    words = ["--model", folder / "small", "--hidden-size", str(hidden_size), "--output", folder / "wide"]
    return call("grow_model", *words)


def opened(folder: Path) -> torch.nn.Module:
    """The model of a folder in float64, whose rounding cannot hide a wrong weight."""
    model_folder = ModelFolder(folder)
    model = build_model(model_folder.config, model_folder.config.model.vocab_size, drawn=False).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model_folder.tensor(name))
    return model


@pytest.mark.parametrize(
    ("model", "hidden_size"),
    [
        ({}, 64),
        ({"activation": "swiglu", "ffn_hidden_size": 48, "num_key_value_heads": 2, "tie_embeddings": False}, 48),
        ({"bias": False, "attention_head_dim": 6, "qkv_bias": True}, 64),
        ({"position_embedding": "learned"}, 40),
    ],
)
def test_the_wide_model_computes_the_same_and_all_of_it_learns(tmp_path, model, hidden_size) -> None:
    config = config_with(**model)
    write_model(tmp_path / "small", TinyState(config), config)
    status, output = grow(tmp_path, hidden_size)
    assert status == 0 and "It computes what" in output, output
    small, wide = opened(tmp_path / "small"), opened(tmp_path / "wide")
    assert wide.config.hidden_size == hidden_size and wide.config.head_dim == small.config.head_dim
    tokens = torch.randint(96, (3, 16))
    # Weights of norms are rounded to float32 once more.
    torch.testing.assert_close(wide(tokens), small(tokens), rtol=1e-6, atol=1e-6)

    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in wide.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wide(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    for name, parameter in wide.named_parameters():
        # Not tokens that do not occur, nor biases of keys, which softmax takes out again.
        if not name.startswith(("embedding.", "head.")) and name.endswith("weight"):
            still = (parameter == before[name]).sum()
            assert still == 0, f"{name}: {still} of {parameter.numel()} entries have not moved"


@pytest.mark.parametrize(
    ("model", "hidden_size", "message"),
    [
        ({}, 32, "--hidden-size: 32 is not in proportion to the 32 channels, 4 heads and 128 units"),
        ({}, 44, "must be 40, 48, 56, ..."),
        ({"normalization_position": "post"}, 64, "model.normalization_position: post normalises the residual stream"),
        ({"normalization": "layernorm"}, 64, "model.normalization: layernorm takes the mean of all channels"),
    ],
)
def test_what_cannot_be_widened_is_refused(tmp_path, model, hidden_size, message) -> None:
    config = config_with(**model)
    write_model(tmp_path / "small", TinyState(config), config)
    status, output = grow(tmp_path, hidden_size)
    assert status != 0 and message in " ".join(output.split()), output
    assert not (tmp_path / "wide").exists()


def test_a_sparse_model_is_refused(tmp_path) -> None:
    config = config_with()
    write_model(tmp_path / "dense", TinyState(config), config)
    words = ["--model", tmp_path / "dense", "--density", "0.3", "--block-size", "8"]
    assert call("sparsify", *words, "--output", tmp_path / "small")[0] == 0
    status, output = grow(tmp_path, 64)
    assert status != 0 and "must be a dense model" in output
