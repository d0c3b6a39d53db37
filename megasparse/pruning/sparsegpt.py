"""SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774): remove weights, and let the others make up for it.

    weight, units = sparsegpt(weight, gram, pattern, available, count)

With the Hessian H = sum of x x^T over the calibration tokens, plus damping on its diagonal, and the upper Cholesky
factor U of its inverse, U^T U = H^-1, columns are gone through from left to right. In a block of columns the units of
lowest w_ij^2 / U_jj^2 are chosen. Where column j loses w, its error w / U_jj times U_jk is taken from every column k
behind it: the best answer of the columns that are not yet decided, in the sense of least squares over the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.pruning.patterns import Pattern, zeroed
from megasparse.pruning.selection import apportion, keep_highest, keep_highest_of_groups

COLUMNS = 128
"""Columns that are decided together, as in the paper; a multiple of the group or block is taken."""
DAMPING = 0.01
"""Share of the mean of H's diagonal that is added to it."""


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    pattern: Pattern,
    available: Tensor,
    count: int,
    *,
    damping: float = DAMPING,
    columns: int = COLUMNS,
) -> tuple[Tensor, Tensor]:
    """The new weight, float32 [out, in], exactly 0 where it is inactive, and the units that are kept.

    weight: float32 [out, in]. gram: float64 [in, in], sum of x x^T over the calibration tokens, or a multiple of it.
    available, count: as for ``magnitude``. Inputs that are always 0 lose their weights first, and the weights that they
    keep stay as they are: nothing is known about them.
    """
    factor, silent = inverse_factor(gram, damping)
    step = pattern.group or pattern.block_size
    width = max(1, columns // step) * step
    edges = [*range(0, weight.shape[1], width), weight.shape[1]]
    unit_edges = [edge // pattern.block_size for edge in edges]
    blocks = list(zip(edges[:-1], edges[1:], strict=True))
    free = [int(available[:, a:b].sum()) for a, b in zip(unit_edges[:-1], unit_edges[1:], strict=True)]
    counts = [0] * len(blocks) if pattern.group else apportion(count, free)
    # Transposed, so that a column of the weight lies together in memory.
    weight_t = zeroed(weight, pattern.weights_of(available)).T.contiguous()
    kept = torch.zeros_like(available)
    for (start, stop), number in zip(blocks, counts, strict=True):
        units = slice(start // pattern.block_size, stop // pattern.block_size)
        part = _Columns(weight_t[start:stop], factor[start:stop, start:stop], silent[start:stop], pattern)
        kept[:, units], errors_t = part.prune(available[:, units], number)
        weight_t[stop:].addmm_(factor[start:stop, stop:].T, errors_t, alpha=-1.0)
    return zeroed(weight_t.T.contiguous(), pattern.weights_of(kept)), kept


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """U, upper triangular, float32, U^T U = (H + damping x mean of H's diagonal)^-1; and which inputs are always 0.

    The inverse is taken in float64: H of strongly correlated inputs is nearly singular. For an input that is always 0
    the diagonal of H is set to its mean, which separates it from the others.
    """
    diagonal = gram.diagonal()
    silent = diagonal == 0
    mean = diagonal.mean().item() or 1.0
    hessian = gram.clone()
    hessian.diagonal().add_(torch.where(silent, mean, 0.0) + damping * mean)
    # Memory holds two of these matrices at a time; for 8,192 inputs each has half a GB.
    lower = torch.linalg.cholesky(hessian)
    del hessian
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True).float(), silent


class _Columns:
    """Columns [start, stop) of the weight, transposed: weight_t [columns, out], changed in place."""

    def __init__(self, weight_t: Tensor, factor: Tensor, silent: Tensor, pattern: Pattern) -> None:
        self.weight_t, self.factor, self.silent, self.pattern = weight_t, factor, silent, pattern

    def prune(self, available: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The kept units [out / b, columns / b], and the errors [columns, out] for the columns behind."""
        group, errors_t = self.pattern.group, torch.zeros_like(self.weight_t)
        kept = available.clone() if group else keep_highest(self._scores(0, len(self.weight_t)), available, count)
        active_t = self.pattern.weights_of(kept).T
        for column in range(len(self.weight_t)):
            if group and column % group == 0:
                # A group is chosen when its turn comes, by weights that have made up for the columns before it.
                part = slice(column, column + group)
                scores = self._scores(column, column + group)
                kept[:, part] = keep_highest_of_groups(scores, available[:, part], self.pattern.kept, group)
                active_t = kept.T
            errors_t[column] = zeroed(self.weight_t[column], ~active_t[column]) / self.factor[column, column]
            self.weight_t[column:].addr_(self.factor[column, column:], errors_t[column], alpha=-1.0)
        return kept, errors_t

    def _scores(self, start: int, stop: int) -> Tensor:
        """|w| / U_jj of the units in these columns: in the order of its square, which might underflow."""
        scales = torch.where(self.silent, 0.0, 1.0 / self.factor.diagonal())[start:stop]
        scales = scales / scales.max().clamp(min=torch.finfo(torch.float32).tiny)
        return self.pattern.unit_scores(self.weight_t[start:stop].T.abs() * scales)
