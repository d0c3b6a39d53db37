"""Dense products for a weight that is exactly zero in its inactive units: any unit, device and dtype; saves no work.

Forward and input gradient are the plain products; only the weight gradient needs the mask. It runs where it is faster
than the block-sparse kernels (high densities), and for single weights. A packed weight is put together for each
product: it comes here only where no other kernel can take it, or by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.storage import stored, whole


def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See ``linear``."""
    return F.linear(x_NI, whole(weight, index), bias)


def backward(
    dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``linear``."""
    dx = dy_NO @ whole(weight, index) if needs[0] else None
    dweight = stored(dy_NO.t() @ x_NI, index) if needs[1] else None
    return dx, dweight, bias_gradient(dy_NO) if needs[2] else None


def bias_gradient(dy_NO: Tensor) -> Tensor:
    """Sum over the tokens: thousands of terms lose all small ones in bfloat16; float32 (or float64) does not."""
    return dy_NO.sum(0, dtype=torch.promote_types(dy_NO.dtype, torch.float32)).to(dy_NO.dtype)
