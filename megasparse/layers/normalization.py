"""Normalisation over the last dimension. torch computes both kinds in float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight (+ bias)."""

    def __init__(self, size: int, *, epsilon: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight."""

    def __init__(self, size: int, *, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def normalization(kind: str, size: int, *, epsilon: float, bias: bool) -> LayerNorm | RMSNorm:
    """The layer for `kind`, `layernorm` or `rmsnorm` (which never has a bias)."""
    if kind == "layernorm":
        return LayerNorm(size, epsilon=epsilon, bias=bias)
    if kind == "rmsnorm":
        return RMSNorm(size, epsilon=epsilon)
    raise ValueError(f"normalization: {kind!r} is unknown; legal values: layernorm, rmsnorm")
