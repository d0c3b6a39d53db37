"""Scores of weights and blocks against float64, over arbitrary cuts."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import cuts

from megasparse.config.schema import DropScoreName
from megasparse.sparsity.scores import DROP_SCORES, block_norms, block_partial_sums


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), block_size=st.sampled_from([2, 3, 8]),
    points=st.lists(st.integers(0, 1600), max_size=6), seed=st.integers(0, 1000),
)  # fmt: skip
def test_pieces_add_up_to_the_whole_wherever_they_are_cut(rows, columns, block_size, points, seed) -> None:
    matrix = torch.randn(
        rows * block_size, columns * block_size, generator=torch.Generator().manual_seed(seed)
    ) * 10 ** (seed % 7)
    flat, grid = matrix.reshape(-1), (rows, columns)
    parts = [block_partial_sums(flat[a:b], a, grid, block_size) for a, b in cuts(flat.numel(), points)]
    assert all(part.shape == grid and part.dtype == torch.float64 for part in parts)
    blocks = matrix.double().view(rows, block_size, columns, block_size).permute(0, 2, 1, 3).reshape(rows, columns, -1)
    expected = torch.linalg.vector_norm(blocks, dim=-1).to(torch.float32).reshape(-1)
    # Float64 sums of a few dozen squares, then one rounding to float32.
    torch.testing.assert_close(block_norms(sum(parts)), expected, rtol=1.2e-7, atol=0)
    whole = block_partial_sums(flat, 0, grid, block_size)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=0)


def test_blocks_outside_of_a_slice_are_zero() -> None:
    sums = block_partial_sums(torch.ones(4), 8, (2, 2), 2)
    assert sums.tolist() == [[0.0, 0.0], [2.0, 2.0]]
    assert not block_partial_sums(torch.ones(0), 5, (2, 2), 2).any()


def test_drop_scores_of_weights() -> None:
    weight, gradient = torch.tensor([2.0, -3.0, 0.0, 1.0, 0.0]), torch.tensor([-1.0, 0.5, 4.0, 0.0, 0.0])

    def scores(name: str, factor: float = 0.0) -> list[float]:
        return DROP_SCORES[name].score(weight, gradient, factor).tolist()

    assert scores("magnitude", 9.0) == [2.0, 3.0, 0.0, 1.0, 0.0]
    assert scores("magnitude_gradient", 2.0) == [4.0, 4.0, 8.0, 1.0, 0.0]
    assert scores("snip") == [2.0, 1.5, 0.0, 0.0, 0.0]
    quotients = scores("magnitude_over_gradient")
    assert quotients[:3] == [2.0, 6.0, 0.0] and 1e37 < quotients[3] < float("inf") and quotients[4] == 0.0


@pytest.mark.parametrize("name", DROP_SCORES)
def test_scores_are_never_negative_or_undefined(name) -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 1.0, -3e38])
    weight, gradient = (t.reshape(-1) for t in torch.meshgrid(values, values, indexing="ij"))
    scores = DROP_SCORES[name].score(weight, gradient, 0.5)
    assert (scores >= 0).all() and not scores.isnan().any()


def test_a_score_that_needs_no_gradient_reads_none() -> None:
    weight, nothing = torch.tensor([2.0, -3.0]), torch.full((2,), float("nan"))
    for name, score in DROP_SCORES.items():
        assert score.score(weight, nothing, 0.5).isnan().any() == score.needs_gradient, name


def test_the_schema_names_the_same_scores() -> None:
    assert set(get_args(DropScoreName)) == set(DROP_SCORES)
