"""AlphaPruning (Lu et al., NeurIPS 2024): blocks whose weights have learned less lose more of them. Needs no data.

    alpha = mean(tail_exponent(eigenvalues(part)) for part in the matrices of a block)
    shares = relative_sparsities(alphas, spread=0.3)

Training gives the eigenvalues of W^T W a heavy tail; its exponent alpha is the smaller, the heavier the tail. A block's
alpha is the mean over its matrices, query, key and value apart. Sparsities relative to one another go up with alpha,
linearly from 1 - spread to 1 + spread; ``budget`` makes densities of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 100
"""Of the histogram of log10 eigenvalues."""
NEAR_PEAK = (0.95, 1.5)
"""The tail begins at an eigenvalue between these multiples of the histogram's peak."""


def eigenvalues(matrix: Tensor) -> Tensor:
    """Squared singular values of a matrix, float64, ascending, those that are 0 up to rounding left out."""
    wide = matrix.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram)
    return values[values > values[-1] * len(values) * torch.finfo(torch.float64).eps]


def tail_exponent(values: Tensor) -> float:
    """Hill's estimator of alpha in the power law x^-alpha that the tail of `values` follows.

    values: float64, ascending, above 0.

    alpha = 1 + n / sum over the tail of ln(x / x_min), with n values from x_min on. x_min lies near the peak of the
    histogram of log10 x, where the distance of Kolmogorov and Smirnov between tail and power law is smallest. NaN where
    there are too few values to tell.
    """
    if len(values) < 3:
        return math.nan
    candidates = _candidates(values)
    fits = [_fit(values, start) for start in candidates]
    return min(fits)[1]


def relative_sparsities(alphas: Sequence[float], spread: float) -> list[float]:
    """From 1 - spread for the smallest alpha to 1 + spread for the largest; all 1 where they are equal.

    A block without an alpha, NaN, gets 1.
    """
    known = [alpha for alpha in alphas if not math.isnan(alpha)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    if high == low:
        return [1.0] * len(alphas)
    return [1.0 if math.isnan(alpha) else 1.0 + spread * (2.0 * (alpha - low) / (high - low) - 1.0) for alpha in alphas]


def _candidates(values: Tensor) -> list[int]:
    """Places where the tail may begin; at least two values follow."""
    logs = values.log10()
    low, high = logs[0].item(), logs[-1].item()
    counts = torch.histc(logs, BINS, low, high)
    peak = 10 ** (low + (high - low) * int(counts.argmax()) / BINS)
    near = (values >= NEAR_PEAK[0] * peak) & (values <= NEAR_PEAK[1] * peak)
    near[-2:] = False
    # Without one near the peak, the next above it.
    return near.nonzero().view(-1).tolist() or [min(int((values < peak).sum()), len(values) - 3)]


def _fit(values: Tensor, start: int) -> tuple[float, float]:
    """The distance between the tail that begins at `start` and its power law, and the exponent."""
    tail = values[start:]
    n, ratios = len(tail), tail / tail[0]
    logs = ratios.log().sum().item()
    if logs == 0.0:
        return math.inf, math.nan
    alpha = 1.0 + n / logs
    # Share of the tail below each of its values: by the power law, and as counted.
    expected = 1.0 - ratios ** (1.0 - alpha)
    counted = torch.arange(n, dtype=torch.float64) / n
    return (expected - counted).abs().max().item(), alpha
