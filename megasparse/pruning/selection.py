"""Choosing units by their scores: exact numbers of them, the same choice on every machine.

    kept = keep_highest(scores, available, count)              # over the whole matrix
    kept = keep_highest_of_rows(scores, available, counts)     # so many in each row
    kept = keep_highest_of_groups(scores, available, 2, 4)     # 2 of every 4 in a row

Scores are float32 and not negative; units that are not available are never kept. Among equal scores the unit that comes
first in row-major order wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from megasparse.sparsity.selection import INELIGIBLE, select_top_k

LAST_KEY = 2**32 - 1


def keep_highest(scores: Tensor, available: Tensor, count: int) -> Tensor:
    """Bool in the shape of `scores`: the `count` highest that are available, of which there must be so many."""
    flat = _eligible(scores, available).reshape(-1)
    (chosen,) = select_top_k([flat], [lambda where: LAST_KEY - where], [count])
    return chosen.view(scores.shape)


def keep_highest_of_rows(scores: Tensor, available: Tensor, counts: Tensor) -> Tensor:
    """counts: int64 [rows], at most the available units of each row."""
    order = _eligible(scores, available).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < counts.to(scores.device).unsqueeze(1)
    return torch.zeros_like(available).scatter_(1, order, first)


def keep_highest_of_groups(scores: Tensor, available: Tensor, kept: int, group: int) -> Tensor:
    """At most `kept` of every `group` neighbours in a row: fewer where fewer are available."""
    rows = scores.reshape(-1, group)
    free = available.reshape(-1, group)
    counts = free.sum(1).clamp(max=kept)
    return keep_highest_of_rows(rows, free, counts).view(scores.shape)


def apportion(total: int, sizes: Sequence[int]) -> list[int]:
    """Divide `total` in proportion to `sizes`, whose sum it does not exceed.

    Whole numbers that add up to `total` exactly, none above its size: sums up to each place are rounded, not the parts.
    """
    whole = sum(sizes)
    assert 0 <= total <= whole, (total, whole)
    if whole == 0:
        return [0] * len(sizes)
    ends = [(2 * total * end + whole) // (2 * whole) for end in accumulate(sizes)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _eligible(scores: Tensor, available: Tensor) -> Tensor:
    return torch.where(available, scores.float(), torch.full((), INELIGIBLE, device=scores.device))
