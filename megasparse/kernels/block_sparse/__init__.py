"""Sparse linear: the products of a linear layer whose weight is zero outside of active units.

Use ``sparse_linear`` and, for a table that shares its weight with a sparse head, ``sparse_embedding``; which kernel
computes them is decided in ``dispatch``. A unit is a square block of `block_size` x `block_size` weights, or a
single weight where `block_size` is 1; ``build_index`` makes the lists of active blocks from a mask on the grid of
units, [out / unit, in / unit].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megasparse.kernels.block_sparse import linear
from megasparse.kernels.block_sparse.dense import SparseEmbedding, apply_mask_
from megasparse.kernels.block_sparse.dispatch import KERNELS, check_forced, check_name, choose, explain
from megasparse.kernels.block_sparse.index import BlockIndex, build_index, refresh_index
from megasparse.kernels.dense_products import dense_linear

__all__ = [
    "KERNELS",
    "BlockIndex",
    "apply_mask_",
    "build_index",
    "check_forced",
    "check_name",
    "choose",
    "explain",
    "refresh_index",
    "sparse_embedding",
    "sparse_linear",
]


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    index: BlockIndex | None,
    dense_gradient: bool = False,
    kernel: str = "auto",
    break_even: float | None = None,
    dense: str = "torch",
) -> torch.Tensor:
    """y = x W^T + b for a weight that is already exactly zero in its inactive units.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [out, in], dense storage, same dtype.
        bias: [out] or None, same dtype.
        index: the active units; None where all are active (plain dense layer).
        dense_gradient: return the gradient of all weights, as a topology update needs it; otherwise the gradient of
            inactive units is exactly zero.
        kernel: `auto` for the fastest one, or a name from `KERNELS`.
        break_even: density above which `auto` takes dense products; None: as measured.
        dense: what computes the dense gradient, and dense products where the kernel is `dense` by name or all units are
            active: a name that ``dense_products.choose`` gave for this input.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: unknown kernel, or a forced one that cannot run.
    """
    check_name(kernel)
    if index is None:
        return dense_linear(x, weight, bias, kernel=dense)
    if kernel == "dense" and dense == "onednn":
        kernel = dense
    assert weight.shape == tuple(size * index.block_size for size in index.mask.shape), (
        f"{weight.shape}, {index.mask.shape}"
    )
    settings = index.block_size, dense_gradient, kernel, break_even, dense
    # The views are made outside of the function: autograd forbids to change the view that a function returns in place.
    x_NI = x.reshape(-1, weight.shape[1])
    y_NO = linear.SparseLinear.apply(x_NI, weight, bias, index.mask, *index.lists, *settings)
    return y_NO.view(*x.shape[:-1], weight.shape[0])


def sparse_embedding(
    ids: torch.Tensor, weight: torch.Tensor, index: BlockIndex | None, dense_gradient: bool = False
) -> torch.Tensor:
    """Rows `ids` of a table that is exactly zero in its inactive units; the gradient rule is that of `sparse_linear`.

    `ids` is an integer tensor of any shape, `weight` [rows, width]; returns [*ids.shape, width].
    """
    if index is None:
        return F.embedding(ids, weight)
    return SparseEmbedding.apply(ids, weight, index.mask, index.block_size, dense_gradient)
