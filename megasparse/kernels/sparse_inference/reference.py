"""What the kernels compute, in plain PyTorch: the weight is unpacked for each product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.quantized import quantize_tokens
from megasparse.kernels.sparse_inference.compressed import CompressedWeight, decompress


def linear(x_NI: Tensor, weight: CompressedWeight, bias_O: Tensor | None) -> Tensor:
    """float32 [N, O]."""
    matrix_OI = decompress(weight)
    if weight.scales_O is None:
        return F.linear(x_NI.float(), matrix_OI.float(), bias_O)
    q_NI, scales_N1 = quantize_tokens(x_NI)
    # Of float64, so that the integers are exact.
    sums_NO = F.linear(q_NI.double(), matrix_OI.double()).float()
    y_NO = sums_NO * (scales_N1 * weight.scales_O)
    return y_NO if bias_O is None else y_NO + bias_O
