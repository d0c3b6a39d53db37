"""What may be concluded from a few seeds: mean, spread, and differences in pairs with a confidence interval.

    paired([3.41, 3.44], [3.45, 3.46])       # Difference(n=2, mean=-0.03, half_width=0.127, wins=2, ...)

Arms share initial weights and order of data by seed, so what a seed does to both cancels in the difference.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Of two arms over the seeds that both have."""

    n: int
    mean: float
    half_width: float | None
    """Of the confidence interval of the mean (Student t, n - 1 degrees of freedom); None for one pair."""
    below: int
    """Pairs in which the first arm has the lower value."""


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """values[i] - others[i]: of the same seed; at least one."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    half_width = None
    if n > 1:
        half_width = student_quantile((1 + CONFIDENCE) / 2, n - 1) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(n, mean, half_width, sum(difference < 0 for difference in differences))


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over the seeds (n - 1); None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def student_quantile(probability: float, freedom: int) -> float:
    """The value below which a Student t variable lies with a probability of 0.5 or more. freedom: whole, 1 or more."""
    assert 0.5 <= probability < 1.0 and freedom >= 1
    # In the angle whose tangent is t / sqrt(freedom), which ends at pi / 2.
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, freedom) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _probability(angle: float, freedom: int) -> float:
    """P(T <= sqrt(freedom) tan(angle)): Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    # cos + 2/3 cos^3 + 2*4/(3*5) cos^5 + ..., or 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 + ...
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + 0.5 * within
