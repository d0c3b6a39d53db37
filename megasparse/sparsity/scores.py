"""How much a unit is worth: scores of weights, and their sums over blocks.

A low drop score means that an active unit goes; a high growth score that an inactive one comes. A block scores the
Frobenius norm over its weights. A rank scores only the slice of the flat matrix that it holds; partial sums over blocks
add up over the ranks. They are kept in float64, so that the float32 result does not depend on where a block was cut
(sums of at most 128 x 128 float32 squares carry 2^-38 of relative error).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TINY, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DropScore:
    """A measure of what a weight is worth."""

    score: Callable[[Tensor, Tensor, float], Tensor]
    """(weight, gradient, `sparsity.drop_score_lambda`) -> 0 or more, float32, all of one shape; finite where weight and
    gradient are."""
    needs_gradient: bool = True
    """Otherwise the gradient that it is given may be anything."""


DROP_SCORES = {
    "magnitude": DropScore(lambda weight, gradient, factor: weight.abs(), needs_gradient=False),
    "magnitude_gradient": DropScore(
        lambda weight, gradient, factor: (weight.abs() + factor * gradient.abs()).clamp(max=LARGEST)
    ),
    # As in the authors' code. Where g is 0 the quotient would be infinite or, for w = 0, undefined: a large finite
    # number ranks the same.
    "magnitude_over_gradient": DropScore(
        lambda weight, gradient, factor: (weight.abs() / gradient.abs().clamp(min=TINY)).clamp(max=LARGEST)
    ),
    # Lee et al., 2019, arXiv 1810.02340.
    "snip": DropScore(lambda weight, gradient, factor: (weight * gradient).abs().clamp(max=LARGEST)),
}
"""By the name in `sparsity.drop_score`; a new one is an entry here and a name in ``DropScoreName`` of the schema."""


def block_partial_sums(values: Tensor, start: int, grid: tuple[int, int], block_size: int) -> Tensor:
    """Sums of squares over blocks of a slice of a flat matrix.

    values: float32 [n], entries [start, start + n) of the row-major matrix [grid[0] unit, grid[1] unit].
    Returns float64 [grid[0], grid[1]]; blocks outside the slice are 0.
    """
    width = grid[1] * block_size
    sums = torch.zeros(grid, dtype=torch.float64, device=values.device)
    if values.numel() == 0:
        return sums
    # Whole rows of blocks around the slice, zero where it does not reach: sums in a fixed order, unlike index_add on
    # GPUs, so that replicas with equal state decide alike.
    first, offset = divmod(start, width * block_size)
    num_block_rows = -(-(offset + values.numel()) // (width * block_size))
    squares = torch.zeros(num_block_rows * block_size * width, dtype=torch.float64, device=values.device)
    squares[offset : offset + values.numel()] = values.to(torch.float64).square()
    sums[first : first + num_block_rows] = squares.view(num_block_rows, block_size, grid[1], block_size).sum(dim=(1, 3))
    return sums


def block_norms(sums: Tensor) -> Tensor:
    """Frobenius norms, float32 [units], from complete sums of squares."""
    return sums.sqrt().to(torch.float32).reshape(-1)
