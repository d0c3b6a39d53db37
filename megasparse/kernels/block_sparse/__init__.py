"""Sparse linear: the products of a linear layer whose weight is zero outside of active units.

Use ``sparse_linear`` and, for a table that shares its weight with a sparse head, ``sparse_embedding``; which kernel
computes them is decided in ``dispatch``. A unit is a square block of `block_size` x `block_size` weights, or a
single weight where `block_size` is 1; ``build_index`` makes the lists of active blocks from a mask on the grid of
units, [out / unit, in / unit].

``packed_linear`` and ``packed_embedding`` are the same for a weight that is stored as its active blocks only, in slots;
``pack``, ``unpack`` and ``assign_slots`` go from one storage to the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megasparse.kernels.block_sparse import linear
from megasparse.kernels.block_sparse.dispatch import KERNELS, check_forced, check_name, choose, explain
from megasparse.kernels.block_sparse.embedding import PackedEmbedding, SparseEmbedding
from megasparse.kernels.block_sparse.index import BlockIndex, build_index, refresh_index
from megasparse.kernels.block_sparse.storage import apply_mask_, assign_slots, pack, unpack, weight_shape

__all__ = [
    "KERNELS",
    "BlockIndex",
    "apply_mask_",
    "assign_slots",
    "build_index",
    "check_forced",
    "check_name",
    "choose",
    "explain",
    "pack",
    "packed_embedding",
    "packed_linear",
    "refresh_index",
    "sparse_embedding",
    "sparse_linear",
    "unpack",
]


def sparse_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    index: BlockIndex | None,
    dense_gradient: bool = False,
    kernel: str = "auto",
    break_even: float | None = None,
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

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: unknown kernel, or a forced one that cannot run.
    """
    check_name(kernel)
    if index is None:
        return F.linear(x, weight, bias)
    assert weight.shape == weight_shape(index), f"{tuple(weight.shape)}, {weight_shape(index)}"
    return _applied(x, weight, bias, None, index, dense_gradient, kernel, break_even)


def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    index: BlockIndex,
    kernel: str = "auto",
    probe: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + b for a weight of which only the active blocks are stored.

    Args:
        x: [..., in], float32, bfloat16 or float16.
        weight: [S, block_size, block_size], same dtype; slot s holds the block that `index.slot_blocks` names. Its
            gradient has the same shape and is exactly zero in empty slots.
        bias: [out] or None, same dtype.
        index: of the active blocks, made with `slot_blocks`.
        kernel: `auto` for the fastest one, at any density, or a name from `KERNELS`; `dense` and `reference` put the
            dense weight together for each product.
        probe: [out, in], any values: where it wants a gradient, that is the dense dy^T x in the dtype of `x`, as a
            topology update needs it. Of several uses autograd makes the sum, as of any tensor.

    Returns:
        [..., out] in the dtype of `x`.

    Raises:
        ValueError: unknown kernel, or a forced one that cannot run.
    """
    check_name(kernel)
    assert index.is_packed, "the index is of dense storage"
    assert weight.shape == weight_shape(index), f"{tuple(weight.shape)}, {weight_shape(index)}"
    return _applied(x, weight, bias, probe, index, False, kernel, None)


def _applied(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    probe: torch.Tensor | None,
    index: BlockIndex,
    *choice: bool | str | float | None,
) -> torch.Tensor:
    """choice: dense_gradient, kernel and break_even of ``sparse_linear``."""
    outputs, inputs = (size * index.block_size for size in index.mask.shape)
    # The views are made outside of the function: autograd forbids to change the view that a function returns in place.
    x_NI = x.reshape(-1, inputs)
    lists = index.mask, *index.lists
    y_NO = linear.SparseLinear.apply(x_NI, weight, bias, probe, *lists, index.block_size, *choice)
    return y_NO.view(*x.shape[:-1], outputs)


def sparse_embedding(
    ids: torch.Tensor, weight: torch.Tensor, index: BlockIndex | None, dense_gradient: bool = False
) -> torch.Tensor:
    """Rows `ids` of a table that is exactly zero in its inactive units; the gradient rule is that of `sparse_linear`.

    `ids` is an integer tensor of any shape, `weight` [rows, width]; returns [*ids.shape, width].
    """
    if index is None:
        return F.embedding(ids, weight)
    return SparseEmbedding.apply(ids, weight, index.mask, index.block_size, dense_gradient)


def packed_embedding(
    ids: torch.Tensor, weight: torch.Tensor, index: BlockIndex, probe: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows `ids` of the table whose active blocks are `weight` [S, block_size, block_size]; see `packed_linear`.

    `ids` is an integer tensor of any shape; returns [*ids.shape, width].
    """
    return PackedEmbedding.apply(ids, weight, probe, index.block_slots)
