"""SM3 on some entries of a matrix, against float64 by hand."""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from megasparse.kernels.optimizer import sm3_

ROWS, COLUMNS, EPSILON = 7, 5, 1e-6


@pytest.mark.parametrize("count", [1, 11, ROWS * COLUMNS])
def test_steps_are_those_of_the_formula(count: int) -> None:
    numbers = torch.randperm(ROWS * COLUMNS)[:count].sort().values
    values, rows, columns = torch.randn(count), torch.zeros(ROWS), torch.zeros(COLUMNS)
    wanted, of_rows, of_columns = values.tolist(), [0.0] * ROWS, [0.0] * COLUMNS
    for step in range(1, 6):
        lr, gradient = 0.1 / step, torch.randn(count) * torch.rand(count)
        sm3_(values, gradient, (rows, columns), (numbers // COLUMNS, numbers % COLUMNS), lr, EPSILON)
        largest_of_rows, largest_of_columns = list(of_rows), list(of_columns)
        for at, number in enumerate(numbers.tolist()):
            (i, j), g = divmod(number, COLUMNS), float(gradient[at])
            bound = min(of_rows[i], of_columns[j]) + g * g
            wanted[at] -= lr * g / (sqrt(bound) + EPSILON)
            largest_of_rows[i] = max(largest_of_rows[i], bound)
            largest_of_columns[j] = max(largest_of_columns[j], bound)
        of_rows, of_columns = largest_of_rows, largest_of_columns
    for found, right in ((values, wanted), (rows, of_rows), (columns, of_columns)):
        torch.testing.assert_close(found.double(), torch.tensor(right, dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_accumulators_bound_the_sums_of_squares() -> None:
    """What makes SM3 no bolder than Adagrad (the paper's claim 2)."""
    rows, columns, sums = torch.zeros(ROWS), torch.zeros(COLUMNS), torch.zeros(ROWS * COLUMNS)
    numbers, values = torch.arange(ROWS * COLUMNS), torch.zeros(ROWS * COLUMNS)
    for _ in range(20):
        gradient = torch.randn(ROWS * COLUMNS)
        sums += gradient.square()
        sm3_(values, gradient, (rows, columns), (numbers // COLUMNS, numbers % COLUMNS), 0.1, EPSILON)
        bound = torch.minimum(rows.view(-1, 1), columns).view(-1)
        assert (bound >= sums * (1 - 1e-5)).all()


def test_rows_in_two_pieces_have_the_largest_of_both() -> None:
    numbers = torch.randperm(ROWS * COLUMNS)[:20].sort().values
    gradients, half = torch.randn(4, 20), slice(0, 9)
    values, rows, columns = torch.zeros(20), torch.zeros(ROWS), torch.zeros(COLUMNS)
    others = torch.zeros(20), torch.zeros(ROWS), torch.zeros(COLUMNS)
    for gradient in gradients:
        sm3_(values, gradient, (rows, columns), (numbers // COLUMNS, numbers % COLUMNS), 0.1, EPSILON)
        pieces = []
        for part in (half, slice(9, 20)):
            own = others[1].clone(), others[2].clone()
            places = numbers[part] // COLUMNS, numbers[part] % COLUMNS
            sm3_(others[0][part], gradient[part], own, places, 0.1, EPSILON)
            pieces.append(own)
        others = others[0], torch.maximum(pieces[0][0], pieces[1][0]), torch.maximum(pieces[0][1], pieces[1][1])
    for found, wanted in zip(others, (values, rows, columns), strict=True):
        assert torch.equal(found, wanted)
