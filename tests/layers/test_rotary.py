"""Rotary embedding against complex multiplication, and its exactness in bfloat16 models."""

from __future__ import annotations

import torch

from megasparse.config.schema import AttentionConfig, ModelConfig, RopeScaling
from megasparse.layers import Attention, LayerFactory
from megasparse.layers.rotary import rotary_tables, rotate


def turned_by_complex_numbers(x: torch.Tensor, theta: float) -> torch.Tensor:
    T, D = x.shape[-2:]
    pairs = torch.complex(x[..., : D // 2].double(), x[..., D // 2 :].double())
    frequency = torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    angle = torch.arange(T, dtype=torch.float64)[:, None] * frequency
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pairs.real, pairs.imag), dim=-1)


def test_matches_complex_multiplication() -> None:
    x = torch.randn(2, 3, 700, 8)
    # One rounding of cosine and sine, two products and a sum in float32.
    torch.testing.assert_close(rotate(x, 10_000.0).double(), turned_by_complex_numbers(x, 10_000.0), rtol=0, atol=2e-6)


def test_scores_depend_on_distance_only() -> None:
    q, k = torch.randn(8, dtype=torch.float32), torch.randn(8, dtype=torch.float32)
    q_T, k_T = rotate(q.expand(1, 1, 50, 8), 100.0)[0, 0], rotate(k.expand(1, 1, 50, 8), 100.0)[0, 0]
    scores = q_T @ k_T.t()
    for distance in (0, 3, 20):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert (scores[10, 10] - scores[10, 3]).abs() > 1e-3


def test_bfloat16_input_loses_only_its_own_rounding() -> None:
    # Frequencies rounded to bfloat16 would turn by whole radians too much at these positions; here the one error is
    # the final rounding of the result, half a unit in the last place: relative 2^-8.
    x = torch.randn(1, 2, 4096, 16).bfloat16()
    expected = turned_by_complex_numbers(x, 10_000.0)
    error = (rotate(x, 10_000.0).double() - expected).abs()
    assert (error <= 2**-8 * expected.abs() * 1.001 + 1e-6).all()


def test_casting_the_module_keeps_the_angles() -> None:
    config = ModelConfig(hidden_size=32, num_attention_heads=2, seq_length=64, position_embedding="rope")
    layer = Attention("a", config, AttentionConfig(), LayerFactory(), output_std=0.02)
    assert not list(layer.buffers())
    layer = layer.bfloat16()
    x = torch.randn(1, 64, 32).bfloat16()
    layer(x).sum().backward()
    cos, sin = rotary_tables(64, 16, config.rope_theta, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    angle = torch.arange(64, dtype=torch.float64)[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    assert (cos.double() - angle.cos()).abs().max() < 2**-24 and (sin.double() - angle.sin()).abs().max() < 2**-24


def test_tables_survive_inference_mode() -> None:
    x = torch.randn(1, 1, 53, 4, requires_grad=True)
    with torch.inference_mode():
        rotate(x, 77.0)
    rotate(x, 77.0).square().sum().backward()
    # A rotation keeps lengths, so the gradient of the squared length is 2 x.
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-6)


def test_scaling_for_longer_contexts() -> None:
    """Llama 3: frequencies of many turns stay, of few turns are divided, between the two interpolated; by hand."""
    D, theta, device = 32, 500.0, torch.device("cpu")
    plain = torch.tensor([theta ** (-2 * i / D) for i in range(D // 2)], dtype=torch.float64)
    turns = 100 * plain / (2 * torch.pi)
    expected = []
    for frequency, turn in zip(plain, turns, strict=True):
        share = 0.0 if turn < 1 else 1.0 if turn > 4 else float((turn - 1) / 3)
        expected.append(float(share * frequency + (1 - share) * frequency / 8))
    assert (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()
    cases = {
        RopeScaling(type="llama3", factor=8.0, original_seq_length=100): torch.tensor(expected, dtype=torch.float64),
        RopeScaling(type="linear", factor=2.0): plain / 2,
    }
    for scaling, frequencies in cases.items():
        cos, sin = rotary_tables(60, D, theta, device, scaling)
        angle = torch.arange(60, dtype=torch.float64)[:, None] * frequencies
        assert (cos.double() - angle.cos()).abs().max() < 2**-23 and (sin.double() - angle.sin()).abs().max() < 2**-23
