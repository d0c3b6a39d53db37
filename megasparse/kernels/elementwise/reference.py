"""What the elementwise operators compute, in torch's own ones: for every device and dtype, and the kernels' reference.

Tensor names: B samples, H heads, T tokens, D head dimension, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gate(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(g) * u of the halves g and u of the last dimension: [..., 2 F] to [..., F]."""
    gate, up = x.chunk(2, dim=-1)
    return function(gate) * up


def layer_norm(x_C: Tensor, weight_C: Tensor, bias_C: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last dimension."""
    return F.layer_norm(x_C, weight_C.shape, weight_C, bias_C, epsilon)


def rms_norm(x_C: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean of x^2 + epsilon) * weight over the last dimension."""
    return F.rms_norm(x_C, weight_C.shape, weight_C, epsilon)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn the pairs (i, i + D/2) by the angles of their tokens; the tables are float32 [T, D/2], and so is the
    arithmetic, at least."""
    first, second = x_BHTD.chunk(2, dim=-1)
    turned = torch.cat((first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD), dim=-1)
    return turned.to(x_BHTD.dtype)
