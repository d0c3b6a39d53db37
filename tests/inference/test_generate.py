"""Sampling: determinism, greedy choice, cuts of the distribution, context, end token; with kept keys and without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.data.tokenizer import load_tokenizer
from megasparse.inference.generation import LastLogits, generate
from megasparse.inference.sampling import check_prompt, sample_text
from megasparse.layers import JoinedCaches, KeyValueCache, LayerFactory
from megasparse.models import GPT

V, T = 30, 8


SHAPE = {"num_layers": 2, "hidden_size": 24, "num_attention_heads": 6, "seq_length": 21, "init_std": 0.5}
STYLES = {
    "learned": {},
    "rope": {"position_embedding": "rope", "num_key_value_heads": 2},
    "one key head": {"position_embedding": "rope", "num_key_value_heads": 1},
    "scaled rope": {
        "position_embedding": "rope",
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
}
MIXED = [
    ("full", "sparse", "local", "sparse", "fixed", "strided"),
    ("strided", "fixed", "full", "local", "local", "full"),
]
PATTERNS = {name: [(name,) * 6] * 2 for name in ("full", "local", "strided", "sparse", "fixed")} | {"mixed": MIXED}


def build() -> GPT:
    config = ModelConfig(num_layers=1, hidden_size=16, num_attention_heads=2, seq_length=T, init_std=0.5)
    return GPT(config, AttentionConfig(), V, LayerFactory(seed=1))


def build_with_patterns(style: str, patterns: str, stride: int = 4, offsets: str = "none") -> GPT:
    attention = AttentionConfig(stride=stride, stride_offsets=offsets)
    model = GPT(ModelConfig(**SHAPE, **STYLES[style]), attention, V, LayerFactory(seed=1))
    model.set_attention_patterns(PATTERNS[patterns])
    return model


class Fixed(nn.Module):
    """Always predicts the same distribution."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config, self.token_multiple = ModelConfig(seq_length=T), 1
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens: torch.Tensor, cache: object = None, last_only: bool = False) -> torch.Tensor:
        return self.logits.expand(*tokens[:, -1:].shape if last_only else tokens.shape, -1)


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


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("patterns", "offsets"), [*((name, "none") for name in PATTERNS), ("mixed", "spread"), ("fixed", "spread")]
)
def test_kept_keys_give_the_logits_of_a_whole_evaluation(style, patterns, offsets) -> None:
    """At every length from a prompt of 1 or 6 tokens to beyond the context, where both evaluate the whole."""
    model, text = build_with_patterns(style, patterns, offsets=offsets), torch.randint(V, (3, 26))
    for prompt in (1, 6):
        kept, whole = LastLogits(model, 26), LastLogits(model, 26, use_cache=False)
        with torch.no_grad():
            for length in range(prompt, 27):
                got, expected = kept(text[:, :length]), whole(text[:, :length])
                # Sums of at most 24 products in float32, in another order; logits are of order 10.
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5, msg=f"length {length}")


@pytest.mark.parametrize("style", STYLES)
def test_a_token_beside_those_of_other_texts_has_the_logits_that_it_has_alone(style) -> None:
    """Texts of several lengths and patterns, which join one after the other and leave."""
    model = build_with_patterns(style, "mixed", offsets="spread")
    texts = [torch.randint(V, (1, length)) for length in (1, 5, 9, 13)]
    caches = [KeyValueCache(2, 21) for _ in texts]
    with torch.no_grad():
        for text, cache in zip(texts, caches, strict=True):
            model(text, cache=cache)
            cache.advance(text.shape[1])
        for members in ([0, 1], [0, 1, 2, 3], [3, 1], [2]):
            new = torch.randint(V, (1, len(members)))
            logits = model(new, cache=JoinedCaches([caches[member] for member in members]))
            for place, member in enumerate(members):
                caches[member].advance(1)
                texts[member] = torch.cat((texts[member], new[:, place : place + 1]), dim=1)
                # Sums in another order, as above.
                expected = model(texts[member])[0, -1]
                torch.testing.assert_close(logits[0, place], expected, rtol=1e-5, atol=2e-5)


def test_offsets_and_scaling_change_what_a_model_says() -> None:
    """Without this, settings that reach neither evaluation would pass the test above."""
    text = torch.randint(V, (3, 21))
    with torch.no_grad():
        plain, scaled = (build_with_patterns(style, "mixed")(text) for style in ("rope", "scaled rope"))
        shifted = build_with_patterns("rope", "mixed", offsets="spread")(text)
    assert (scaled - plain).abs().max() > 0.1 and (shifted - plain).abs().max() > 0.1


@pytest.mark.parametrize("stride", [1, 3, 5, 64])
def test_greedy_text_is_the_same_without_kept_keys(stride) -> None:
    for style in STYLES:
        model, prompt = build_with_patterns(style, "mixed", stride), torch.tensor([[7, 1, 2], [3, 3, 9]])
        kept = generate(model, prompt, 22, temperature=0)
        assert torch.equal(kept, generate(model, prompt, 22, temperature=0, use_cache=False)), style
        rows = [generate(model, row.unsqueeze(0), 22, temperature=0) for row in prompt]
        assert torch.equal(kept, torch.cat(rows)), style


def test_a_token_is_evaluated_once_while_the_context_holds_it() -> None:
    model, evaluated = build(), []
    model.register_forward_pre_hook(lambda module, arguments: evaluated.append(arguments[0].shape[1]))
    generate(model, torch.tensor([[1, 2, 3]]), 8)
    # Eight tokens fit; then the context slides.
    assert evaluated == [3, 1, 1, 1, 1, 1, T, T]
    evaluated.clear()
    generate(model, torch.zeros(1, T + 4, dtype=torch.int64), 2)
    assert evaluated == [T, T]


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


def test_a_cut_that_keeps_all_is_none() -> None:
    probabilities = [0.1, 0.4, 0.05, 0.3, 0.15]
    for cut in ({"top_p": 1}, {"top_k": 5}, {"top_k": 7, "top_p": 1.0}):
        assert torch.equal(sample(probabilities, **cut), sample(probabilities)), cut


def test_stops_after_the_end_token() -> None:
    drawn = sample([0.5, 0.5], 100).tolist()
    first = drawn.index(1)
    assert sample([0.5, 0.5], 100, end_tokens={1}).tolist() == drawn[: first + 1]


def test_any_of_several_end_tokens_ends_a_text() -> None:
    drawn = sample([0.4, 0.3, 0.3], 100).tolist()
    first = min(drawn.index(1), drawn.index(2))
    assert sample([0.4, 0.3, 0.3], 100, end_tokens=[2, 1]).tolist() == drawn[: first + 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_ids_that_there_are_are_drawn(temperature) -> None:
    """The two last entries, which the tokenizer does not have, are the likeliest."""
    drawn = sample([0.1, 0.2, 0.3, 0.4], num_ids=2, temperature=temperature)
    assert set(drawn.tolist()) == ({0, 1} if temperature else {1})


def test_a_text_of_a_model_of_more_entries_than_its_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    # Of 512 entries the 257 of the tokenizer are unlikely; the last one of a text is the end of a document.
    text = sample_text(Fixed([1e-3] * 257 + [1.0] * 255), tokenizer, "a", 60, seed=0, top_k=None)
    assert text.startswith("a") and len(text) > 1
    # An own end and beginning, of which the tokenizer has no entry either, are no part of the text.
    certain = Fixed([0.0] * 98 + [1.0] + [0.0] * 413)
    assert sample_text(certain, tokenizer, "a", 5, seed=0, end_tokens=[98, 500]) == "a"
    assert sample_text(certain, tokenizer, "", 5, seed=0, begin_token=500) == "bbbbb"


def test_the_smallest_temperatures_are_greedy() -> None:
    for temperature in (1e-29, 1e-31, 1e-320):
        assert set(sample([0.4, 0.6], 20, temperature=temperature).tolist()) == {1}


def test_rows_that_end_wait_for_the_others() -> None:
    prompt = torch.zeros(6, 1, dtype=torch.int64)
    rows = generate(Fixed([0.7, 0.3]), prompt, 100, generator=seeded(3), end_tokens={1})[:, 1:]
    firsts = [row.index(1) for row in rows.tolist()]
    assert len(set(firsts)) > 1 and rows.shape[1] == max(firsts) + 1
    assert all(row[first:].eq(1).all() for row, first in zip(rows, firsts, strict=True))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1, 2], {}, r"prompt: shape \(2,\)"),
        ([[]], {}, r"prompt: shape \(1, 0\)"),
        ([[1]], {"temperature": -0.1}, "temperature: -0.1"),
        ([[1]], {"temperature": math.nan}, "temperature: nan; must be 0 .greedy. or more, and finite"),
        ([[1]], {"temperature": math.inf}, "temperature: inf; must be"),
        ([[1]], {"top_k": 0}, "top_k: 0; must be unset"),
        ([[1]], {"top_k": 2.5}, "top_k: 2.5; must be unset"),
        ([[1]], {"top_p": math.nan}, "top_p: nan; must be unset"),
        ([[1]], {"top_p": 0.0}, "top_p: 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p: 1.1"),
    ],
)
def test_mistakes_are_named(prompt, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        generate(build(), torch.tensor(prompt, dtype=torch.int64), 1, **options)


def test_prompts_longer_than_the_context_are_refused() -> None:
    model, tokenizer = build(), load_tokenizer("bytes")
    length = model.config.seq_length
    check_prompt("prompt", length, length)
    with pytest.raises(ValueError, match=f"prompt: {length + 1} tokens; must be at most {length}, the model's seq_len"):
        sample_text(model, tokenizer, "a" * (length + 1), 1, seed=0)
