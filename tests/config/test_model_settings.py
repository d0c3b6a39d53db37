"""What the settings of the model derive, and the contradictions among them."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.checks import unused_settings
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import LayerFactory
from megasparse.models import GPT

ROPE = ["model.position_embedding=rope", "model.vocab_size=64"]


def test_heads_may_be_wider_than_their_share_of_the_stream() -> None:
    config = ModelConfig(
        num_layers=1, hidden_size=20, num_attention_heads=3, num_key_value_heads=1, attention_head_dim=16, bias=False,
        qkv_bias=True,
    )  # fmt: skip
    model = GPT(config, AttentionConfig(), 64, LayerFactory())
    attention = model.layers[0].attention
    assert attention.qkv.weight.shape == (5 * 16, 20) and attention.output.weight.shape == (20, 3 * 16)
    assert attention.qkv.bias is not None and attention.output.bias is None and model.layers[0].mlp.up.bias is None
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 64)


@pytest.mark.parametrize(("qkv_bias", "bias", "has"), [(None, True, True), (None, False, False), (False, True, False)])
def test_biases_of_queries_follow_the_others_unless_set(qkv_bias, bias, has) -> None:
    assert ModelConfig(bias=bias, qkv_bias=qkv_bias).has_qkv_bias == has


def test_gelu_without_approximation() -> None:
    exact, tanh = (
        GPT(ModelConfig(num_layers=1, activation=kind), AttentionConfig(), 64, LayerFactory()).layers[0].mlp
        for kind in ("gelu_exact", "gelu")
    )
    x = torch.randn(2, 768) * 20
    torch.testing.assert_close(exact(x), exact.down(torch.nn.functional.gelu(exact.up(x))))
    assert not torch.equal(exact(x), tanh(x))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([*ROPE, "model.attention_head_dim=15"], "attention_head_dim: rope needs an even one, got 15"),
        (["model.hidden_size=20", "model.num_attention_heads=3"], "num_attention_heads: 3 does not divide"),
        ([*ROPE, "model.rope_scaling={type: yarn, factor: 2}"], "rope_scaling.type: .yarn. is not allowed"),
        ([*ROPE, "model.rope_scaling={type: linear, factor: 0.5}"], "rope_scaling.factor: 0.5"),
        (
            [*ROPE, "model.rope_scaling={type: llama3, factor: 2, low_freq_factor: 4}"],
            "low_freq_factor: 4.0 must be below high_freq_factor 4.0",
        ),
    ],
)
def test_contradictions_are_refused(overrides, reason) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config([], overrides)


def test_scaling_without_rotary_embedding_is_unused() -> None:
    config = load_config([], ["model.rope_scaling={type: linear, factor: 2}", "model.vocab_size=64"])
    assert "model.rope_scaling is used by model.position_embedding rope only" in unused_settings(config)
