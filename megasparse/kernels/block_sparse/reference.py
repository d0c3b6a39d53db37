"""Reference kernel of the sparse linear layer: dense products, exact, any device and dtype; saves no work.

The weight [out, in] is stored dense and is exactly zero where its unit is dead, so forward and input gradient are the
plain products; only the weight gradient needs the mask. Nothing but the input, the weight and the mask is saved for
the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def apply_mask_(tensor: torch.Tensor, mask: torch.Tensor, unit: int) -> torch.Tensor:
    """Set the entries of dead units to exactly zero, in place.

    Args:
        tensor: [out, in], any strides.
        mask: bool [out / unit, in / unit], True where the unit is live.
        unit: side of the square units; 1: single entries.

    Returns:
        `tensor`.
    """
    rows, columns = mask.shape
    assert tensor.shape == (rows * unit, columns * unit), f"{tuple(tensor.shape)}, grid {(rows, columns)}, unit {unit}"
    # Filling, unlike multiplying by zero, also clears infinities and leaves no negative zeros.
    tensor.view(rows, unit, columns, unit).masked_fill_(~mask[:, None, :, None], 0)
    return tensor


class SparseLinear(torch.autograd.Function):
    """y = x W^T + b whose weight gradient is zero in dead units, unless the dense gradient is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor,
        unit: int,
        dense_gradient: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.unit, ctx.dense_gradient = unit, dense_gradient
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        if needs_dx:
            dx = dy @ weight
        dy_rows = dy.reshape(-1, weight.shape[0])
        if needs_dweight:
            dweight = dy_rows.t() @ x.reshape(-1, weight.shape[1])
            if not ctx.dense_gradient:
                apply_mask_(dweight, mask, ctx.unit)
        if needs_dbias:
            # A sum over thousands of tokens loses all small terms in bfloat16; float32 (float64 for float64) does not.
            accumulate = torch.promote_types(dy.dtype, torch.float32)
            dbias = dy_rows.sum(0, dtype=accumulate).to(dy.dtype)
        return dx, dweight, dbias, None, None, None


class SparseEmbedding(torch.autograd.Function):
    """Rows of a sparse table; the same gradient rule as `SparseLinear`."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor, unit: int, dense_gradient: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(ids, mask)
        ctx.num_rows, ctx.unit, ctx.dense_gradient = weight.shape[0], unit, dense_gradient
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids, mask = ctx.saved_tensors
        # The operator behind the gradient of F.embedding; padding index -1 means none.
        dweight = torch.ops.aten.embedding_dense_backward(dy.contiguous(), ids, ctx.num_rows, -1, False)
        if not ctx.dense_gradient:
            apply_mask_(dweight, mask, ctx.unit)
        return None, dweight, None, None, None
