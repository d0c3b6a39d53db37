"""The grid of a quantised weight: whole numbers times a scale, of each output channel or of groups of its inputs.

    matrix = quantized(weight, bits=4, group=32)
    weight_again = matrix.dequantized()

b bits hold the levels -(2^(b-1) - 1) to 2^(b-1) - 1: symmetric, so that 0 is level 0 and stays exactly 0, and the
smallest two's complement number is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (3, 4, 8)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A weight [out, in] as levels and scales."""

    values: Tensor
    """Levels, int8 [out, in]."""
    scales: Tensor
    """float32 [out], or [out, groups] where neighbouring inputs share a scale."""

    def dequantized(self) -> Tensor:
        """float32 [out, in]."""
        return expanded(self.scales, self.values.shape[1]) * self.values


def largest_level(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def row_scales(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """The scales under which the largest magnitude of each row, or of each `group` inputs of it, is the largest level.

    weight: finite [out, in]; group divides `in`. Returns float32 [out] or [out, in / group]; 1 where all is 0.
    """
    assert group is None or weight.shape[1] % group == 0, (weight.shape, group)
    weight = weight.float()
    grouped = weight if group is None else weight.view(len(weight), -1, group)
    scales = grouped.abs().amax(-1) / largest_level(bits)
    return torch.where(scales > 0, scales, 1.0)


def quantized(weight: Tensor, bits: int, group: int | None = None, scales: Tensor | None = None) -> QuantizedMatrix:
    """Each weight at the nearest level, of two equally near ones at the even one. scales: instead of ``row_scales``."""
    scales = row_scales(weight, bits, group) if scales is None else scales
    levels = (weight.float() / expanded(scales, weight.shape[1])).round_()
    largest = largest_level(bits)
    return QuantizedMatrix(levels.clamp_(-largest, largest).to(torch.int8), scales)


def expanded(scales: Tensor, width: int) -> Tensor:
    """The scale of each weight, in a shape that broadcasts over [out, width]."""
    if scales.dim() == 1:
        return scales.unsqueeze(1)
    return scales.repeat_interleave(width // scales.shape[1], dim=1)
