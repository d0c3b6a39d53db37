"""A step of SM3 on some entries of a matrix (Anil et al. 2019, arXiv 1901.11150, algorithm SM3-II).

    sm3_(values, gradient, (rows, columns), (row of each, column of each), lr, epsilon)

In place of a sum of squared gradients for each entry there is an upper bound of them for each row and column.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sm3_(
    values: Tensor,
    gradient: Tensor,
    accumulators: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    lr: float,
    epsilon: float,
) -> None:
    """values -= lr g / (sqrt(v) + epsilon), where v = min(rows[i], columns[j]) + g^2; then rows and columns become the
    largest v of their entries, where that is more.

    values, gradient: float32 [n]. accumulators: float32 [R], [C]. places: int64 [n] each, i and j. Values and
    accumulators are changed in place. No momentum. A row that is divided over ranks has the largest of theirs.
    """
    (rows, columns), (row_of, column_of) = accumulators, places
    bound = torch.minimum(rows[row_of], columns[column_of]).addcmul_(gradient, gradient)
    rows.scatter_reduce_(0, row_of, bound, "amax")
    columns.scatter_reduce_(0, column_of, bound, "amax")
    values.addcdiv_(gradient, bound.sqrt_().add_(epsilon), value=-lr)
