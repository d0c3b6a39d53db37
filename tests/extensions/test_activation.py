"""An activation added from outside the package trains, is planned and is counted like any other."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from plain_flops import count_flops

from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import ModelConfig
from megasparse.conversion.huggingface.settings import read_settings
from megasparse.conversion.huggingface.settings_out import choose_architecture, write_settings
from megasparse.cost.resources import activation_bytes
from megasparse.models import build_model
from megasparse.planning.step_time import block_elements
from megasparse.utils.activations import ACTIVATIONS, Activation

SMALL = [
    "model.hidden_size=32", "model.num_attention_heads=2", "model.num_layers=1", "model.seq_length=8",
    "model.vocab_size=61", "train.precision=fp32", "sparsity.algorithm=dense", "data.tokenizer=null",
]  # fmt: skip


def config_with(activation: str):
    """A small configuration; the schema does not know the name, as for an extension outside of this repository."""
    config = load_config([], SMALL)
    return config.model_copy(update={"model": config.model.model_copy(update={"activation": activation})})


@pytest.fixture
def squared_relu(monkeypatch) -> str:
    monkeypatch.setitem(ACTIVATIONS, "squared_relu", Activation(lambda x: x.relu().square()))
    return "squared_relu"


@pytest.fixture
def reglu(monkeypatch) -> str:
    monkeypatch.setitem(ACTIVATIONS, "reglu", Activation(lambda x: x.relu(), gated=True, transformers_names=("relu",)))
    return "reglu"


def test_it_trains_as_written_out(squared_relu) -> None:
    torch.manual_seed(3)
    mlp = build_model(config_with(squared_relu), 61).double().layers[0].mlp
    x_BTC = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    plain_BTC = x_BTC.detach().clone().requires_grad_()
    up, down = mlp.up, mlp.down
    inner = (plain_BTC @ up.weight.T + up.bias).clamp(min=0) ** 2
    expected = inner @ down.weight.T + down.bias
    found = mlp(x_BTC)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(found)
    found.backward(direction)
    gradient = up.weight.grad.clone()
    up.weight.grad = None
    expected.backward(direction)
    torch.testing.assert_close(gradient, up.weight.grad)
    torch.testing.assert_close(x_BTC.grad, plain_BTC.grad)


def test_it_is_planned_and_counted_as_one_that_is_not_gated(squared_relu) -> None:
    ours, gelu = config_with(squared_relu), config_with("gelu")
    assert ours.model.mlp_width == gelu.model.mlp_width
    assert activation_bytes(ours) == activation_bytes(gelu) and block_elements(ours) == block_elements(gelu)
    with torch.device("meta"):
        assert count_flops(build_model(ours, 61), 2, 8) == count_flops(build_model(gelu, 61), 2, 8)


def test_a_gated_one_has_the_shape_and_the_costs_of_swiglu(reglu) -> None:
    ours, swiglu = config_with(reglu), config_with("swiglu")
    assert ours.model.mlp_width == swiglu.model.mlp_width == 128
    assert activation_bytes(ours) == activation_bytes(swiglu) and block_elements(ours) == block_elements(swiglu)
    with torch.device("meta"):
        mlp = build_model(ours, 61).layers[0].mlp
    assert tuple(mlp.gate_up.weight.shape) == (2 * 128, 32)


def test_conversion_knows_it_by_the_name_of_the_table(reglu, squared_relu) -> None:
    llama = {"position_embedding": "rope", "normalization": "rmsnorm", "bias": False}
    gated = config_with(reglu)
    gated = gated.model_copy(update={"model": gated.model.model_copy(update=llama)})
    architecture = choose_architecture(gated)
    written = {**write_settings(architecture, gated), "vocab_size": 61}
    assert architecture.name == "LlamaForCausalLM" and written["hidden_act"] == "relu"
    assert read_settings(written)[1]["model"]["activation"] == reglu
    # Without such a name it cannot be told to transformers.
    with pytest.raises(ConfigError, match="model.activation is 'squared_relu'; must be one of 'gelu', 'gelu_exact'"):
        choose_architecture(config_with(squared_relu), "GPT2LMHeadModel")


def test_exact_gelu_costs_what_its_approximation_does() -> None:
    exact, gelu = config_with("gelu_exact"), config_with("gelu")
    assert block_elements(exact) == block_elements(gelu) != block_elements(config_with("swiglu"))


def test_the_schema_names_the_same_activations() -> None:
    assert set(get_args(ModelConfig.model_fields["activation"].annotation)) == set(ACTIVATIONS)
    for name, activation in ACTIVATIONS.items():
        width = ModelConfig(hidden_size=96, activation=name).mlp_width
        assert width == (256 if activation.gated else 384)
