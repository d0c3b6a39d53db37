"""Likelihoods of windows: right, independent of padding, and the same on any number of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from harness import run_distributed

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.evaluation.scoring import Scorer, default_batch_size
from megasparse.evaluation.windows import SlidingWindows, Window, continuation_window
from megasparse.layers import LayerFactory
from megasparse.models import GPT

V, T = 61, 24


def small_model() -> GPT:
    torch.manual_seed(5)
    config = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=T, vocab_size_multiple=16)
    model = GPT(config, AttentionConfig(), V, LayerFactory())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def some_windows() -> list[Window]:
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(0, V, 1 + i % 9), rng.integers(0, V, 1 + i % 4)) for i in range(23)]
    windows = [continuation_window(list(a), list(b), T) for a, b in pairs]
    return [*windows, *SlidingWindows(rng.integers(0, V, 100), T, 10)]


def scores_on(mesh, batch_sizes: list[int]) -> list[torch.Tensor]:
    scorers = [Scorer(small_model(), batch_size=size, ranks=mesh.control) for size in batch_sizes]
    return [torch.from_numpy(scorer.scores(some_windows())) for scorer in scorers]


def test_likelihoods_are_those_of_the_logits() -> None:
    model, windows = small_model(), some_windows()
    scores = Scorer(model, batch_size=5).scores(windows)
    assert scores.dtype == np.float64 and scores.shape == (len(windows), 2)
    for window, (likelihood, greedy) in zip(windows, scores, strict=True):
        tokens = torch.from_numpy(np.array(window.tokens))
        with torch.no_grad():
            logits = model(tokens[None, :-1])[0, window.first - 1 :].double()
        targets = tokens[window.first :]
        expected = logits.log_softmax(1).gather(1, targets[:, None]).sum().item()
        assert likelihood == pytest.approx(expected, rel=1e-5)
        assert greedy == float((logits.argmax(1) == targets).all())
    assert not scores[:, 1].all()


@pytest.mark.parametrize("rows", [1, 7])
def test_logits_are_there_in_chunks_only_and_results_stay(rows: int) -> None:
    model, windows, most = small_model(), some_windows(), []
    expected = Scorer(model).scores(windows)
    model.head.register_forward_hook(lambda module, inputs, logits: most.append(logits.numel() // logits.shape[-1]))
    found = Scorer(model, chunk_elements=rows * V + 3).scores(windows)
    assert max(most) == rows and len(most) > len(windows)
    # Rounding of sums of 61 exponentials in float32.
    assert found[:, 0] == pytest.approx(expected[:, 0], rel=1e-6) and np.array_equal(found[:, 1], expected[:, 1])


def test_greedy_continuations_are_recognised() -> None:
    model = small_model()
    tokens = torch.tensor([[3, 1, 4]])
    for _ in range(3):
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(2)], 1)
    greedy = tokens[0].tolist()
    wrong = [*greedy[:-1], (greedy[-1] + 1) % V]
    windows = [continuation_window(row[:3], row[3:], T) for row in (greedy, wrong)]
    assert Scorer(model).scores(windows)[:, 1].tolist() == [1.0, 0.0]


def test_scores_are_the_same_on_any_number_of_ranks() -> None:
    """With 64 windows at once there is a single batch, and two ranks have nothing to do."""
    alone = [Scorer(small_model(), batch_size=size).scores(some_windows()) for size in (3, 64)]
    for shared in run_distributed(scores_on, 3, [3, 64]):
        assert all(np.array_equal(found.numpy(), expected) for found, expected in zip(shared, alone, strict=True))


def test_what_is_not_finite_is_refused() -> None:
    model = small_model()
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    with pytest.raises(ArithmeticError, match="log-likelihood of window 0 is nan"):
        Scorer(model).scores(some_windows())


def test_default_batch_depends_on_the_model_alone() -> None:
    assert default_batch_size(32, 257) == 32
    assert default_batch_size(1024, 50257) == 5
    assert default_batch_size(131072, 128256) == 1


def test_lower_precision_is_close() -> None:
    windows = some_windows()
    exact = Scorer(small_model()).scores(windows)
    rough = Scorer(small_model().to(torch.bfloat16)).scores(windows)
    assert not np.array_equal(rough, exact)
    assert rough[:, 0] == pytest.approx(exact[:, 0], rel=0.03)
