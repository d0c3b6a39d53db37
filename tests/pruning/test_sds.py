"""Sparse, dense, sparse: its optimum against a plain one, errors below those of one pruning, exact counts."""

from __future__ import annotations

import pytest
import torch

from megasparse.pruning.criteria import magnitude, wanda
from megasparse.pruning.patterns import parse_pattern, zeroed
from megasparse.pruning.sds import dense_again, largest_eigenvalue, sparse_dense_sparse
from megasparse.pruning.sparsegpt import sparsegpt
from megasparse.pruning.statistics import output_error


def layer(inputs: int = 48, outputs: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the gram of inputs that go together, some far larger than others."""
    torch.manual_seed(0)
    mixing = torch.randn(inputs, inputs) * torch.arange(1, inputs + 1).float() ** -0.5
    tokens = torch.randn(500, inputs) @ mixing.T * torch.exp(0.5 * torch.randn(inputs))
    return torch.randn(outputs, inputs), (tokens.T @ tokens).double()


def test_the_dense_layer_has_no_direction_in_which_it_could_go_down() -> None:
    """At the minimum the gradient of the outputs is 0 where there is no price, and at most the price elsewhere."""
    weight, gram = layer(12, 9)
    kept = torch.rand(9, 12) < 0.5
    found = dense_again(zeroed(weight, kept), weight, gram, kept, penalty=0.3, steps=3000).double()
    hessian = gram / gram.diagonal().mean()
    slope = (found - weight.double()) @ hessian
    price = (0.3 * weight.abs().mean() * hessian.diagonal()).expand_as(slope)
    # Float32 sums of 12 terms, divided by the smallest eigenvalue on the way.
    tolerance = 1e-4 * price.max()
    assert slope[kept].abs().max() < tolerance
    assert ((slope.abs() - price)[~kept]).max() < tolerance
    back = ~kept & (found != 0)
    assert 0 < back.sum() < (~kept).sum()
    torch.testing.assert_close(slope[back], -price[back] * found[back].sign(), rtol=0, atol=float(tolerance))


def test_the_largest_eigenvalue() -> None:
    _, gram = layer()
    expected = torch.linalg.eigvalsh(gram)[-1].item()
    assert expected / 1.05 < largest_eigenvalue(gram.float()) < expected * (1 + 1e-5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_errors_fall_and_counts_stay(method: str, pattern: str) -> None:
    weight, gram = layer()
    chosen = parse_pattern(pattern)
    grid = (weight.shape[0] // chosen.block_size, weight.shape[1] // chosen.block_size)
    available = torch.ones(grid, dtype=torch.bool)
    available[0, :4] = False
    count = grid[0] * grid[1] // 2
    norms = gram.diagonal().sqrt().float()

    def prune(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if method == "sparsegpt":
            return sparsegpt(given, gram, chosen, available, count)
        by_magnitude = method == "magnitude"
        more = () if by_magnitude else (norms,)
        return given, (magnitude if by_magnitude else wanda)(given, *more, chosen, available, count)

    once, units = prune(weight)
    twice, again = sparse_dense_sparse(prune, weight, gram, chosen, available)
    assert again.sum() == units.sum() and not (again & ~available).any()
    first, second = (
        output_error(weight, zeroed(found, chosen.weights_of(kept)), gram)
        for found, kept in ((once, units), (twice, again))
    )
    assert second < 0.97 * first, (first, second)
