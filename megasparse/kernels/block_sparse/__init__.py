"""Sparse linear: the products of a linear layer whose weight is zero outside of live units.

Use ``sparse_linear`` and, for a table that shares its weight with a sparse head, ``sparse_embedding``; which kernel
computes them is decided here and nowhere else. ``executed_density`` tells which share of the dense work that kernel
really does. A unit is a square block of `unit` x `unit` weights, or a single weight where `unit` is 1; masks are bool
on the grid of units, [out / unit, in / unit].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F

from megasparse.kernels.block_sparse import reference
from megasparse.kernels.block_sparse.reference import apply_mask_

__all__ = ["apply_mask_", "executed_density", "sparse_embedding", "sparse_linear"]


@dataclass(frozen=True)
class LinearKernel:
    """A way to compute the sparse linear layer, and the share of the dense work that it does at a density."""

    linear: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, int, bool], torch.Tensor]
    executed_density: Callable[[float], float]


KERNELS: Mapping[str, LinearKernel] = MappingProxyType(
    {"reference": LinearKernel(reference.SparseLinear.apply, lambda density: 1.0)}
)


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    unit: int,
    dense_gradient: bool,
    kernel: str = "auto",
) -> torch.Tensor:
    """y = x W^T + b for a weight that is already exactly zero in its dead units.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [out, in], dense storage, same dtype.
        bias: [out] or None.
        mask: bool [out / unit, in / unit], True where the unit is live; None where all are (plain dense layer).
        unit: side of the square units.
        dense_gradient: return the gradient of all weights, as a topology step needs it; otherwise the gradient of
            dead units is exactly zero.
        kernel: `auto` for the fastest one that supports the input, or a name from `KERNELS`.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: unknown kernel.
    """
    linear = KERNELS[select_kernel(kernel)].linear
    if mask is None:
        return F.linear(x, weight, bias)
    return linear(x, weight, bias, mask, unit, dense_gradient)


def sparse_embedding(
    ids: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, unit: int, dense_gradient: bool
) -> torch.Tensor:
    """Rows `ids` of a table that is exactly zero in its dead units; the gradient rule is that of `sparse_linear`.

    `ids` is an integer tensor of any shape, `weight` [rows, width]; returns [*ids.shape, width].
    """
    if mask is None:
        return F.embedding(ids, weight)
    return reference.SparseEmbedding.apply(ids, weight, mask, unit, dense_gradient)


def executed_density(kernel: str, density: float) -> float:
    """Share of the dense work that `kernel` does for a layer of this density."""
    return KERNELS[select_kernel(kernel)].executed_density(density)


def select_kernel(kernel: str) -> str:
    """The name in `KERNELS` that `kernel` stands for. Raises ValueError where there is none."""
    if kernel == "auto":
        return "reference"
    if kernel not in KERNELS:
        raise ValueError(f"block_sparse kernel: {kernel!r} is unknown; legal values: {', '.join(['auto', *KERNELS])}")
    return kernel
