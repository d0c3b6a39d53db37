"""Attention, perceptrons and norms, each against its equation written out."""

from __future__ import annotations

import math

import pytest
import torch

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.hybrid_attention import pattern_mask
from megasparse.layers import MLP, Attention, LayerFactory, Normalization
from megasparse.layers.rotary import rotate

FACTORY = LayerFactory(seed=3)


@pytest.mark.parametrize("position_embedding", ["learned", "rope"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_is_naive_softmax(groups, position_embedding) -> None:
    config = ModelConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=groups, position_embedding=position_embedding,
        init_std=0.5,
    )  # fmt: skip
    layer = Attention("a", config, AttentionConfig(stride=4), FACTORY, output_std=0.3).double()
    patterns = ("full", "local", "sparse", "fixed")
    layer.set_patterns(patterns)
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    rows = layer.qkv.weight.split([32, 8 * groups, 8 * groups])
    biases = layer.qkv.bias.split([32, 8 * groups, 8 * groups])
    q, k, v = ((x @ w.t() + b).view(2, 19, -1, 8) for w, b in zip(rows, biases, strict=True))
    if position_embedding == "rope":
        q, k = (rotate(t.transpose(1, 2), config.rope_theta).transpose(1, 2) for t in (q, k))
    heads = []
    for h in range(4):
        g = h * groups // 4
        scores = torch.einsum("bqd,bkd->bqk", q[:, :, h], k[:, :, g]) / math.sqrt(8)
        scores = scores.masked_fill(~pattern_mask(patterns[h], 19, 4), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, :, g])
    expected = torch.cat(heads, -1) @ layer.output.weight.t() + layer.output.bias
    torch.testing.assert_close(layer(x), expected)


def test_attention_patterns_are_checked() -> None:
    layer = Attention("a", ModelConfig(hidden_size=32, num_attention_heads=4), AttentionConfig(), FACTORY, output_std=1)
    assert layer.patterns == ("full",) * 4
    for wrong in (("full",) * 3, "full"):
        with pytest.raises(ValueError, match="one name for each of 4 heads"):
            layer.set_patterns(wrong)
    with pytest.raises(ValueError, match="'lokal'"):
        layer.set_patterns(("full", "full", "full", "lokal"))


def test_gelu_mlp() -> None:
    layer = MLP("m", ModelConfig(hidden_size=24, init_std=0.5), FACTORY, output_std=0.5).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    u = x @ layer.up.weight.t() + layer.up.bias
    u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    torch.testing.assert_close(layer(x), u @ layer.down.weight.t() + layer.down.bias)
    assert layer.up.weight.shape == (96, 24)


def test_swiglu_mlp() -> None:
    config = ModelConfig(hidden_size=24, activation="swiglu", bias=False, ffn_hidden_size=40, init_std=0.5)
    layer = MLP("m", config, FACTORY, output_std=0.5).double()
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    gate, up = x @ layer.gate_up.weight[:40].t(), x @ layer.gate_up.weight[40:].t()
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.down.weight.t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_normalization(kind, bias) -> None:
    layer = Normalization(kind, 12, epsilon=1e-3, bias=bias)
    assert (layer.weight == 1).all()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(5, 12) * 3 + 1
    wide = x.double()
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * layer.weight.double()
    if kind == "layernorm" and bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    # Large bfloat16 values whose squares a bfloat16 mean would ruin: float32 inside leaves the final rounding and
    # one for the product with the weight.
    big = (torch.randn(4, 12) * 1e4).bfloat16()
    got, reference = layer.bfloat16()(big).double(), layer.double()(big.double())
    assert (got - reference).abs().max() <= 2**-7 * reference.abs().max()


def test_unknown_normalization() -> None:
    with pytest.raises(ValueError, match="'batchnorm'.*layernorm, rmsnorm"):
        Normalization("batchnorm", 4, epsilon=1e-5, bias=True)
