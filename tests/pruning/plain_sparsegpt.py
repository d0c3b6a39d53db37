"""SparseGPT as its paper states it: column by column, with the inverse Hessian of the columns that are left.

Nothing is shared with the implementation: no Cholesky factor, no lazy updates, float64, loops over single weights.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def prune(weight: Tensor, inputs: Tensor, choose, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """New weight float64 [out, in] and its mask.

    inputs: [tokens, in]. choose(column, weight, scores, mask) changes the mask of the columns from `column` on, where
    it has something to decide; scores: w^2 over the diagonal that each column will have when its turn comes.
    """
    weight, inputs = weight.double().clone(), inputs.double()
    hessian = inputs.T @ inputs
    silent = hessian.diagonal() == 0
    mean = hessian.diagonal().mean()
    hessian = hessian + damping * mean * torch.eye(len(hessian)) + torch.diag(silent.double() * mean)
    # Element (j, j) of the inverse of the Hessian of columns j and behind.
    diagonal = torch.stack([torch.linalg.inv(hessian[j:, j:])[0, 0] for j in range(len(hessian))])
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        scores = torch.where(silent, 0.0, weight.square() / diagonal)
        choose(j, scores, mask)
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in range(weight.shape[0]):
            if not mask[row, j]:
                weight[row, j:] -= weight[row, j] / inverse[0, 0] * inverse[0]
                weight[row, j] = 0.0
    return weight, mask


def share(count: int, columns: int, of: int) -> int:
    """What is kept up to a column where `count` are kept of all, the half rounded up."""
    return int(Fraction(count * columns, of) + Fraction(1, 2))


def lowest_of_columns(columns: int, count: int):
    """Unstructured: in every `columns` columns the lowest scores go; `count` stay in all."""

    def choose(j: int, scores: Tensor, mask: Tensor) -> None:
        if j % columns:
            return
        part = slice(j, min(j + columns, scores.shape[1]))
        kept = share(count, part.stop, scores.shape[1]) - share(count, part.start, scores.shape[1])
        values = scores[:, part].reshape(-1)
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[values.argsort(descending=True, stable=True)[:kept]] = True
        mask[:, part] = chosen.view(len(scores), -1)

    return choose


def lowest_of_groups(kept: int, group: int):
    """n:m: when a group begins, its lowest scores go."""

    def choose(j: int, scores: Tensor, mask: Tensor) -> None:
        if j % group:
            return
        for row in range(scores.shape[0]):
            order = scores[row, j : j + group].argsort(descending=True, stable=True)
            mask[row, j : j + group] = False
            mask[row, j + order[:kept]] = True

    return choose


def lowest_blocks(size: int, columns: int, count: int):
    """Blocks: in every `columns` columns those with the lowest sum of scores go; `count` stay in all."""

    def choose(j: int, scores: Tensor, mask: Tensor) -> None:
        if j % columns:
            return
        part = slice(j, min(j + columns, scores.shape[1]))
        grid_rows = scores.shape[0] // size
        kept = share(count, part.stop, scores.shape[1]) - share(count, part.start, scores.shape[1])
        sums = {
            (r, c): float(scores[r * size : (r + 1) * size, c : c + size].sum())
            for r in range(grid_rows)
            for c in range(part.start, part.stop, size)
        }
        mask[:, part] = False
        for r, c in sorted(sums, key=lambda place: -sums[place])[:kept]:
            mask[r * size : (r + 1) * size, c : c + size] = True

    return choose
