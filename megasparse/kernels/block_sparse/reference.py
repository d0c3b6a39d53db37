"""Reference of the sparse linear layer: what every kernel must compute, written as plainly as possible.

y = x (W * M)^T + b and its gradients, dense products with sums in float32 (float64 for float64) whatever the dtype.
It trusts nothing (inactive weights are masked here, elsewhere they are known to be zero) and saves nothing; tests
compare the kernels with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.storage import apply_mask_, stored, whole


def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See ``linear``."""
    y_NO = _wide(x_NI) @ _active(weight, index).t()
    if bias is not None:
        y_NO = y_NO + _wide(bias)
    return y_NO.to(x_NI.dtype)


def backward(
    dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``linear``."""
    dx = (_wide(dy_NO) @ _active(weight, index)).to(dy_NO.dtype) if needs[0] else None
    dweight = stored(_wide(dy_NO).t() @ _wide(x_NI), index).to(weight.dtype) if needs[1] else None
    dbias = _wide(dy_NO).sum(0).to(dy_NO.dtype) if needs[2] else None
    return dx, dweight, dbias


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _active(weight: Tensor, index: BlockIndex) -> Tensor:
    """[out, in], zero in inactive units whatever the weight holds there."""
    matrix = _wide(whole(weight, index))
    return apply_mask_(matrix.clone() if matrix is weight else matrix, index.mask, index.block_size)
