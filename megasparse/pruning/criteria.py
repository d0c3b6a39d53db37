"""Pruning without changing what stays: by magnitude, and Wanda (Sun et al. 2024, arXiv 2306.11695).

    units = magnitude(weight, pattern, available, count)
    units = wanda(weight, norms, pattern, available, count)

Magnitude compares |w| over the whole matrix. Wanda compares |w_ij| ||x_j||, the norm of input j over all calibration
tokens, among the weights of one output. A block scores the Frobenius norm of the scores of its weights; by Wanda it is
compared with the blocks of its row of blocks. With n:m both compare within each group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.pruning.patterns import Pattern
from megasparse.pruning.selection import apportion, keep_highest, keep_highest_of_groups, keep_highest_of_rows


def magnitude(weight: Tensor, pattern: Pattern, available: Tensor, count: int) -> Tensor:
    """Units to keep, bool [out / b, in / b].

    weight: float32 [out, in]. available: bool units, those that an earlier mask has left. count: how many to keep;
    an n:m pattern says that itself.
    """
    scores = pattern.unit_scores(weight.abs())
    if pattern.group:
        return keep_highest_of_groups(scores, available, pattern.kept, pattern.group)
    return keep_highest(scores, available, count)


def wanda(weight: Tensor, norms: Tensor, pattern: Pattern, available: Tensor, count: int) -> Tensor:
    """As ``magnitude``. norms: float32 [in], Euclidean norm of each input over the calibration tokens, or
    a multiple.

    `count` is divided over the rows in proportion to what is available in them, so that all rows of a dense matrix keep
    the same number, or one more.
    """
    scores = pattern.unit_scores(weight.abs() * norms)
    if pattern.group:
        return keep_highest_of_groups(scores, available, pattern.kept, pattern.group)
    counts = apportion(count, available.sum(1).tolist())
    return keep_highest_of_rows(scores, available, torch.tensor(counts))
