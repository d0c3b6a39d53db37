"""int8 weights times int8 activations in torch, exact: what faster kernels are compared with.

y = int8_linear(x, values, scales, bias)

Activations are quantised while the layer runs, each token by its own largest magnitude (LLM.int8, Dettmers et al. 2022,
arXiv 2208.07339, section 2.1; SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, O1), so nothing need be known of them
before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megasparse.kernels.quantized.grid import largest_level

EXACT_COLUMNS = 1024
"""A float32 sum of so many products of levels is exact: 1024 x 127 x 127 is below 2^24."""


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Levels int8 [..., in] and scales float32 [..., 1] of activations [..., in].

    The scale of a token with an infinite entry, or one that is no number, is none either, and so is what comes of it.
    """
    x, largest = x.float(), largest_level(8)
    scales = x.abs().amax(-1, keepdim=True) / largest
    scales = torch.where(scales > 0, scales, 1.0)
    finite = x.isfinite().all(-1, keepdim=True)
    levels = torch.where(finite, x / scales, 0.0).round_().clamp_(-largest, largest).to(torch.int8)
    return levels, torch.where(finite, scales, torch.nan)


def int8_linear(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Activations [..., in] in any dtype, levels int8 [out, in], their scales float32 [out]; [..., out] as x is.

    The sum over inputs is exact; scales and bias are applied in float32.
    """
    levels, token_scales = quantize_tokens(x)
    total = torch.zeros((*x.shape[:-1], len(values)), dtype=torch.float64, device=x.device)
    for left, right in zip(levels.split(EXACT_COLUMNS, -1), values.split(EXACT_COLUMNS, 1), strict=True):
        total += left.float() @ right.float().T
    y = total.float() * (token_scales * scales)
    return (y if bias is None else y + bias.float()).to(x.dtype)
