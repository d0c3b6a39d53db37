"""Dense products for a weight that is exactly zero in its inactive units: any unit, device and dtype; saves no work.

Forward and input gradient are the plain products; only the weight gradient needs the mask. It runs where it is faster
than the block-sparse kernels (high densities), and for single weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.dense_products import onednn


def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See ``linear``."""
    return F.linear(x_NI, weight, bias)


def backward(
    dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``linear``."""
    dx = dy_NO @ weight if needs[0] else None
    dweight = apply_mask_(dy_NO.t() @ x_NI, index.mask, index.block_size) if needs[1] else None
    return dx, dweight, bias_gradient(dy_NO) if needs[2] else None


class ByOneDnn:
    """The same with the products of ``dense_products.onednn``, in float32 on CPUs."""

    @staticmethod
    def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
        """See ``linear``."""
        return onednn.product(x_NI, weight, bias)

    @staticmethod
    def backward(
        dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See ``linear``."""
        dx = onednn.product(dy_NO, weight.t()) if needs[0] else None
        dweight = apply_mask_(onednn.weight_gradient(dy_NO, x_NI), index.mask, index.block_size) if needs[1] else None
        return dx, dweight, bias_gradient(dy_NO) if needs[2] else None


def bias_gradient(dy_NO: Tensor) -> Tensor:
    """Sum over the tokens: thousands of terms lose all small ones in bfloat16; float32 (or float64) does not."""
    return dy_NO.sum(0, dtype=torch.promote_types(dy_NO.dtype, torch.float32)).to(dy_NO.dtype)


def apply_mask_(tensor: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Set the entries of inactive units to exactly zero, in place.

    Args:
        tensor: [out, in], any strides.
        mask: bool [out / unit, in / unit], True where the unit is active.
        block_size: side of the square units; 1: single entries.

    Returns:
        `tensor`.
    """
    rows, columns = mask.shape
    assert tensor.shape == (rows * block_size, columns * block_size), (
        f"{tuple(tensor.shape)}, grid {(rows, columns)}, unit {block_size}"
    )
    # Filling, unlike multiplying by zero, also clears infinities and leaves no negative zeros.
    tensor.view(rows, block_size, columns, block_size).masked_fill_(~mask[:, None, :, None], 0)
    return tensor


class SparseEmbedding(torch.autograd.Function):
    """Rows of a table that is zero in its inactive units, under the gradient rule of the sparse linear layer."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, mask: Tensor, block_size: int, dense_gradient: bool) -> Tensor:
        ctx.save_for_backward(ids, mask)
        ctx.num_rows, ctx.block_size, ctx.dense_gradient = weight.shape[0], block_size, dense_gradient
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, mask = ctx.saved_tensors
        # The operator behind the gradient of F.embedding; padding index -1 means none.
        dweight = torch.ops.aten.embedding_dense_backward(dy.contiguous(), ids, ctx.num_rows, -1, False)
        if not ctx.dense_gradient:
            apply_mask_(dweight, mask, ctx.block_size)
        return None, dweight, None, None, None
