"""Sparse, dense, sparse (SDS, arXiv 2408.10473): prune, let the removed weights come back, prune again.

    weight, units = sparse_dense_sparse(prune, weight, gram, pattern, available)

Between the two prunings the layer is dense again and learns, from its pruned weights on, to give the outputs of the
original weights W0, with a price on the weights that were removed. With H = X X^T over the calibration tokens, scaled
to a mean diagonal of 1, it goes down

    1/2 tr((W - W0) H (W - W0)^T) + penalty x mean |W0| x sum over the removed of H_jj |w_ij|

by proximal gradient steps with Nesterov's momentum (FISTA; Beck and Teboulle 2009). So weights that matter come back,
those that stay make up for the others, and the second pruning finds fewer weights that it would miss. The paper names
distillation by layer and a sparse regulariser with soft masks; this form of them is our own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasparse.pruning.patterns import Pattern, zeroed

PENALTY = 1.0
STEPS = 50
POWER_STEPS = 30
"""Of the power iteration for the largest eigenvalue of H."""
SAFETY = 1.05
"""The power iteration comes from below."""

Prune = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weight -> new weight, whose inactive entries may hold anything, and the units to keep."""


def sparse_dense_sparse(
    prune: Prune, weight: Tensor, gram: Tensor, pattern: Pattern, available: Tensor, *, penalty: float = PENALTY
) -> tuple[Tensor, Tensor]:
    """What `prune` makes of the weight that it has pruned once and that became dense again.

    weight: float32 [out, in]. gram: float64 [in, in], sum of x x^T over the calibration tokens. available: units that
    an earlier mask has left; others stay 0.
    """
    first, units = prune(weight)
    kept = pattern.weights_of(units)
    dense = dense_again(zeroed(first, kept), weight, gram, kept, penalty=penalty)
    return prune(zeroed(dense, pattern.weights_of(available)))


def dense_again(
    pruned: Tensor, weight: Tensor, gram: Tensor, kept: Tensor, *, penalty: float = PENALTY, steps: int = STEPS
) -> Tensor:
    """The minimum of the header, approached from `pruned` on. kept: bool [out, in], what has no price."""
    mean = gram.diagonal().mean().item()
    if mean == 0.0:
        return pruned
    hessian = (gram / mean).float()
    rate = 1.0 / (SAFETY * largest_eigenvalue(hessian))
    price = rate * penalty * weight.abs().mean() * hessian.diagonal()
    prices = torch.where(kept, 0.0, price)
    current = ahead = pruned
    momentum = 1.0
    for _ in range(steps):
        stepped = ahead - rate * ((ahead - weight) @ hessian)
        shrunk = stepped.sign() * (stepped.abs() - prices).clamp(min=0.0)
        following = (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5) / 2.0
        ahead = shrunk + (momentum - 1.0) / following * (shrunk - current)
        current, momentum = shrunk, following
    return current


def largest_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric matrix without negative eigenvalues, by power iteration; below it by some percent at most.

    Begins with row sums of absolute values, which the first eigenvector is hardly at right angles to."""
    vector = matrix.abs().sum(1)
    for _ in range(POWER_STEPS):
        vector = matrix @ (vector / vector.norm())
    return vector.norm().item()
