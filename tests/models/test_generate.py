"""Sampling: determinism, greedy choice, cuts of the distribution, context, end token."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import LayerFactory
from megasparse.models import GPT, generate

V, T = 30, 8


def build() -> GPT:
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=T, init_std=0.5)
    return GPT(config, AttentionConfig(), V, LayerFactory(seed=1))


class Fixed(nn.Module):
    """Always predicts the same distribution."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config, self.token_multiple = ModelConfig(seq_length=T), 1
        self.logits = torch.tensor(probabilities).log()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*tokens.shape, -1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(probabilities: list[float], count: int = 400, **options) -> torch.Tensor:
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    return generate(Fixed(probabilities), prompt, count, generator=seeded(3), **options)[0, 1:]


def test_deterministic_with_a_seeded_generator() -> None:
    model, prompt = build(), torch.tensor([[1, 2, 3]])
    first, again, other = (generate(model, prompt, 20, generator=seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 23) and torch.equal(first[:, :3], prompt) and first.max() < V
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_greedy_takes_the_most_likely_token_of_the_cropped_context() -> None:
    model, tokens = build(), torch.tensor([[4]])
    got = generate(model, tokens, 3 * T, temperature=0)
    for _ in range(3 * T):
        logits = model(tokens[:, -T:])[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(got, tokens)


def test_temperature() -> None:
    # Probabilities 0.8 and 0.2 become 16/17 and 1/17 at half the temperature; 400 draws, deviation 0.012.
    share = (sample([0.8, 0.2], temperature=0.5) == 1).double().mean()
    assert abs(share - 1 / 17) < 0.05
    assert abs((sample([0.8, 0.2]) == 1).double().mean() - 0.2) < 0.08


def test_top_k_and_top_p_cut_the_tail() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    assert set(sample(probabilities).tolist()) == {0, 1, 2, 3, 4}
    assert set(sample(probabilities, top_k=1).tolist()) == {1}
    assert set(sample(probabilities, top_k=3).tolist()) == {1, 3, 4}
    assert set(sample(probabilities, top_k=9).tolist()) == {0, 1, 2, 3, 4}
    assert set(sample(probabilities, top_p=0.39).tolist()) == {1}
    assert set(sample(probabilities, top_p=0.65).tolist()) == {1, 3}
    assert set(sample(probabilities, top_p=0.8).tolist()) == {1, 3, 4}
    # Of the two most likely, 4/7 and 3/7, the first alone reaches one half.
    assert set(sample(probabilities, top_k=2, top_p=0.5).tolist()) == {1}


def test_stops_after_the_end_token() -> None:
    drawn = sample([0.5, 0.5], 100).tolist()
    first = drawn.index(1)
    assert sample([0.5, 0.5], 100, end_token=1).tolist() == drawn[: first + 1]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[1], [2]], {}, r"prompt: shape \(2, 1\)"),
        ([[]], {}, r"prompt: shape \(1, 0\)"),
        ([[1]], {"temperature": -0.1}, "temperature: -0.1"),
        ([[1]], {"top_k": 0}, "top_k: 0"),
        ([[1]], {"top_p": 0.0}, "top_p: 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p: 1.1"),
    ],
)
def test_mistakes_are_named(prompt, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(build(), torch.tensor(prompt, dtype=torch.int64), 1, **options)
