"""An activation added from outside the package trains, is planned and is counted like any other."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.config.schema import ModelConfig
from megasparse.cost.flops import count_flops
from megasparse.cost.resources import activation_bytes
from megasparse.layers.activations import ACTIVATIONS, Activation
from megasparse.models import build_model
from megasparse.planning.step_time import block_elements

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


def test_exact_gelu_costs_what_its_approximation_does() -> None:
    exact, gelu = config_with("gelu_exact"), config_with("gelu")
    assert block_elements(exact) == block_elements(gelu) != block_elements(config_with("swiglu"))


def test_the_schema_names_the_same_activations() -> None:
    assert set(get_args(ModelConfig.model_fields["activation"].annotation)) == set(ACTIVATIONS)
    for name, activation in ACTIVATIONS.items():
        width = ModelConfig(hidden_size=96, activation=name).mlp_width
        assert width == (256 if activation.gated else 384)
