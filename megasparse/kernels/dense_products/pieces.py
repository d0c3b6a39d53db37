"""Products of bfloat16 on CPUs: torch's, which are oneDNN's, given their operands as they are multiplied fastest.

On a Xeon with AMX (2,048 tokens, width 768, one thread) oneDNN made 760 GFLOP/s where an output has 50,304 columns and
1,150 with 3,072, and 500 in gradients of weights, whose left operand it transposes itself. So wide outputs are made
piece by piece, and one operand, or the other and the result, is transposed apart: 1,080, and 750 to 930 (throw-away
measurement).

Names: N tokens, I input width, O output width; A, B, K rows of the operands and what is summed over.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.dense_products.transposition import transpose_into, transposed

OUTPUTS = 2048
"""Columns of a piece; outputs up to twice as wide are made at once."""

PIECE = 1024
"""Outputs of a gradient that are made before they are transposed: 1.5 MiB at a width of 768."""


@torch.no_grad()
def product(left_AK: Tensor, right_BK: Tensor, bias_B: Tensor | None = None) -> Tensor:
    """left right^T + bias, [A, B]."""
    if len(right_BK) <= 2 * OUTPUTS:
        return F.linear(left_AK, right_BK, bias_B)
    y_AB = left_AK.new_empty(len(left_AK), len(right_BK))
    for first in range(0, len(right_BK), OUTPUTS):
        piece = slice(first, first + OUTPUTS)
        right_KP = right_BK[piece].t()
        if bias_B is None:
            torch.mm(left_AK, right_KP, out=y_AB[:, piece])
        else:
            torch.addmm(bias_B[piece], left_AK, right_KP, out=y_AB[:, piece])
    return y_AB


@torch.no_grad()
def weight_gradient(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dy^T x, [O, I]: with the one transposed, or the other and the result, whichever is less to copy."""
    (N, O), I = dy_NO.shape, x_NI.shape[1]  # noqa: E741
    if N * O <= N * I + O * I:
        return torch.mm(transposed(dy_NO), x_NI)
    x_IN, gradient_OI = transposed(x_NI), x_NI.new_empty(O, I)
    for first in range(0, O, PIECE):
        piece = slice(first, first + PIECE)
        transpose_into(gradient_OI[piece], torch.mm(x_IN, dy_NO[:, piece]))
    return gradient_OI
