"""Hill's estimator finds planted exponents; densities meet their budget exactly, within their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasparse.config.loader import ConfigError
from megasparse.pruning.budget import LayerUnits, spread_counts, uniform_counts
from megasparse.pruning.heavy_tails import eigenvalues, relative_sparsities, tail_exponent
from megasparse.pruning.selection import (
    apportion,
    keep_highest,
    keep_highest_of_groups,
    keep_highest_of_rows,
)


def power_law(alpha: float, count: int, smallest: float = 0.3) -> torch.Tensor:
    """Values with the density x^-alpha from `smallest` on: the quantiles of it, so without luck."""
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return smallest * (1.0 - quantiles) ** (-1.0 / (alpha - 1.0))


@pytest.mark.parametrize("alpha", [1.6, 2.0, 2.7, 3.5, 5.0])
def test_planted_exponents_are_found(alpha) -> None:
    assert tail_exponent(power_law(alpha, 4000)) == pytest.approx(alpha, rel=0.02)
    drawn = 0.3 * (1.0 - torch.rand(4000, dtype=torch.float64).sort().values) ** (-1.0 / (alpha - 1.0))
    # The standard error of Hill's estimator is (alpha - 1) / sqrt(n), and the tail may be a part of them.
    assert tail_exponent(drawn) == pytest.approx(alpha, abs=6 * (alpha - 1.0) / math.sqrt(2000))


def test_it_is_hills_formula_on_the_best_tail() -> None:
    values = eigenvalues(torch.randn(60, 90))
    best = (math.inf, math.nan)
    logs = values.log10()
    counts, edges = torch.histogram(logs, 100)
    peak = 10 ** edges[counts.argmax()].item()
    for i, smallest in enumerate(values.tolist()[:-2]):
        if not 0.95 * peak <= smallest <= 1.5 * peak:
            continue
        tail = values.tolist()[i:]
        alpha = 1.0 + len(tail) / (sum(math.log(x) for x in tail) - len(tail) * math.log(smallest))
        distance = max(abs(1.0 - (x / smallest) ** (1.0 - alpha) - k / len(tail)) for k, x in enumerate(tail))
        best = min(best, (distance, alpha))
    assert math.isfinite(best[0]) and tail_exponent(values) == pytest.approx(best[1], rel=1e-12)


def test_eigenvalues_are_squared_singular_values() -> None:
    matrix = torch.randn(17, 40) @ torch.diag(torch.rand(40))
    expected = torch.linalg.svdvals(matrix.double()).square().sort().values
    torch.testing.assert_close(eigenvalues(matrix), expected)
    torch.testing.assert_close(eigenvalues(matrix.T), expected)
    # Those that are 0 are left out: the matrix has rank 5.
    assert len(eigenvalues(torch.randn(30, 5) @ torch.randn(5, 20))) == 5
    assert math.isnan(tail_exponent(eigenvalues(torch.ones(2, 2))))
    assert len(eigenvalues(torch.zeros(4, 4))) == 0


def test_the_scale_of_a_matrix_plays_no_part() -> None:
    matrix = torch.randn(64, 100)
    assert tail_exponent(eigenvalues(1000 * matrix)) == pytest.approx(tail_exponent(eigenvalues(matrix)), rel=1e-6)


def test_larger_exponents_are_pruned_more() -> None:
    shares = relative_sparsities([3.0, 2.0, 4.0, math.nan], 0.3)
    assert shares == pytest.approx([1.0, 0.7, 1.3, 1.0])
    assert relative_sparsities([2.5, 2.5], 0.3) == [1.0, 1.0]
    layers = [LayerUnits(name, 1000, 1000) for name in "abc"]
    counts = spread_counts(layers, 0.5, dict(zip("abc", shares, strict=False)))
    assert counts == {"a": 500, "b": 650, "c": 350}


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.0, 1.0), st.floats(0.05, 1.95)), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
)
def test_budgets_are_met_exactly_within_their_bounds(rows, density) -> None:
    layers = [LayerUnits(str(i), units, int(units * left)) for i, (units, left, _) in enumerate(rows)]
    shares = {str(i): share for i, (_, _, share) in enumerate(rows)}
    whole = sum(layer.units for layer in layers)
    wanted = min(whole, max(1, int(density * whole + 0.5)))
    if sum(layer.available for layer in layers) < wanted:
        with pytest.raises(ConfigError, match="--density: .* is above the density that the model has already"):
            spread_counts(layers, density, shares)
        return
    counts = spread_counts(layers, density, shares)
    assert sum(counts.values()) == wanted
    assert all(0 <= counts[layer.name] <= layer.available for layer in layers)


def test_a_layer_keeps_a_tenth_of_the_density() -> None:
    layers = [LayerUnits(name, 10_000, 10_000) for name in "ab"]
    counts = spread_counts(layers, 0.05, {"a": 1.3, "b": 0.7})
    assert counts["a"] == pytest.approx(50, abs=1) and sum(counts.values()) == 1000


def test_uniform_is_refused_where_a_layer_has_less() -> None:
    layers = [LayerUnits("a", 100, 30), LayerUnits("b", 100, 100)]
    assert uniform_counts(layers, 0.3) == {"a": 30, "b": 30}
    with pytest.raises(ConfigError, match="--density: 0.4 is above what layer a has left, 0.3000"):
        uniform_counts(layers, 0.4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0.0, 1.0))
def test_shares_are_in_proportion(sizes, part) -> None:
    total = int(part * sum(sizes))
    shares = apportion(total, sizes)
    assert sum(shares) == total and all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    exact = [total * size / max(sum(sizes), 1) for size in sizes]
    assert all(abs(share - value) <= 1.0 for share, value in zip(shares, exact, strict=True))


def test_among_equal_scores_the_first_wins() -> None:
    scores, free = torch.ones(2, 6), torch.ones(2, 6, dtype=torch.bool)
    free[0, 0] = False
    assert keep_highest(scores, free, 7).tolist() == [[False, *[True] * 5], [True, True, *[False] * 4]]
    kept = keep_highest_of_rows(scores, free, torch.tensor([2, 1]))
    assert kept.tolist() == [[False, True, True, False, False, False], [True, *[False] * 5]]
    kept = keep_highest_of_groups(torch.tensor([[1.0, 3.0, 2.0, 0.0, 0.0, 0.0]]), free[:1], 1, 3)
    assert kept.tolist() == [[False, True, False, True, False, False]]
