"""How much a unit is worth: scores of weights, and their sums over blocks.

A low drop score means that an active unit goes; a high growth score that a dead one comes. A block scores the Frobenius
norm over its weights. A rank scores only the slice of the flat matrix that it holds; partial sums over blocks add up
over the ranks. They are kept in float64, so that the float32 result does not depend on where a block was cut (sums of
at most 128 x 128 float32 squares carry 2^-38 of relative error).
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny


def drop_scores(kind: str, weight: Tensor, gradient: Tensor, gradient_lambda: float) -> Tensor:
    """Score of each weight, float32, 0 or more. weight, gradient: float32, any shape.

    magnitude |w|; magnitude_gradient |w| + lambda |g|; sensitivity |w / g|, as in the authors' code.
    """
    if kind == "magnitude":
        return weight.abs()
    if kind == "magnitude_gradient":
        return weight.abs() + gradient_lambda * gradient.abs()
    assert kind == "sensitivity", kind
    # Where g is 0 the quotient would be infinite or, for w = 0, undefined: a large finite number ranks the same.
    return (weight.abs() / gradient.abs().clamp(min=TINY)).clamp(max=torch.finfo(torch.float32).max)


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
