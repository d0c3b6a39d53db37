"""A run with tensor trains is, from outside, a model with the matrices that they say: opened, converted, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_states import TinyState, write_run

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.huggingface.exporting import export_huggingface
from megasparse.conversion.inspection.description import describe
from megasparse.conversion.inspection.opening import open_any
from megasparse.conversion.sources import open_source, write_source
from megasparse.inference.trained import open_trained
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT

V = 257


def tensor_train_config(activation: str, cores: int) -> RunConfig:
    model = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "ffn_hidden_size": 96,
        "activation": activation, "normalization": "rmsnorm", "position_embedding": "rope", "bias": False,
        "vocab_size": V,
    }  # fmt: skip
    return check_config(
        {
            "model": model,
            "train": {"steps": 24, "precision": "fp32", "global_batch_size": 4},
            "data": {"tokenizer": "bytes"},
            "sparsity": {"algorithm": "dense"},
            "tensor_train": {"rank": 3, "cores": cores},
        }
    )


@pytest.fixture(params=[("swiglu", 2), ("swiglu", 3)], ids=str)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, GPT]:
    """A run folder, and its model with the tensor trains themselves."""
    config = tensor_train_config(*request.param)
    saved = TinyState(config, vocab_size=V)
    model = build_model(config, V).eval()
    model.load_state_dict({name: kinds["fp32"] for name, kinds in saved.tensors.items()}, strict=False)
    return write_run(tmp_path / "run", saved, config), model


@torch.no_grad()
def test_models_compute_what_the_run_computed(run: tuple[Path, GPT], tmp_path: Path) -> None:
    folder, model = run
    tokens = torch.randint(V, (2, 16))
    expected = model(tokens)[..., :V]
    opened = open_trained(folder)
    torch.testing.assert_close(opened.model(tokens)[..., :V], expected, rtol=1e-4, atol=1e-5)
    write_source(open_source(folder), tmp_path / "model")
    converted = ModelFolder(tmp_path / "model")
    assert converted.config.tensor_train.rank is None and converted.shape("layers.0.mlp.gate_up.weight") == (192, 32)
    torch.testing.assert_close(open_trained(tmp_path / "model").model(tokens)[..., :V], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_exports_compute_it_too(run: tuple[Path, GPT], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, model = run
    export_huggingface(open_source(folder), tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokens = torch.randint(V, (2, 16))
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[..., :V], rtol=1e-4, atol=1e-4)


def test_an_inspection_shows_the_cores(run: tuple[Path, GPT]) -> None:
    folder, model = run
    text = json.dumps(describe(open_any(folder)), default=str)
    assert "layers.1.mlp.down.core_0" in text and "layers.1.mlp.down.weight" not in text
