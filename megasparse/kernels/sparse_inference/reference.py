"""What the kernels compute, in plain PyTorch: the weight is unpacked for each product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.sparse_inference.compressed import CompressedWeight, decompress


def linear(x_NI: Tensor, weight: CompressedWeight, bias_O: Tensor | None) -> Tensor:
    """float32 [N, O]."""
    matrix_OI = decompress(weight)
    if weight.scales_O is None:
        return F.linear(x_NI.float(), matrix_OI.float(), bias_O)
    q_NI, scales_N = quantize_rows(x_NI)
    # Of float64, so that the integers are exact.
    sums_NO = F.linear(q_NI.double(), matrix_OI.double()).float()
    y_NO = sums_NO * (scales_N[:, None] * weight.scales_O)
    return y_NO if bias_O is None else y_NO + bias_O


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, I] and float32 scales [N]: symmetric, the largest entry of a row becomes 127.

    The scale of a row with an infinite entry, or one that is no number, is none either.
    """
    x_NI = x_NI.float()
    scales_N = x_NI.abs().amax(1) / 127
    scales_N = torch.where(scales_N > 0, scales_N, 1.0)
    finite_N = x_NI.isfinite().all(1)
    q_NI = torch.where(finite_N[:, None], x_NI / scales_N[:, None], 0.0).round().clamp(-127, 127).to(torch.int8)
    return q_NI, torch.where(finite_N, scales_N, torch.nan)
