"""Normalisation over the last dimension. torch computes both kinds in float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.parallel import ShardSpec, TensorParallel


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * weight (+ bias). Lies between the layers of `tensor_parallel`."""

    def __init__(
        self, size: int, *, epsilon: float = 1e-5, bias: bool = True, tensor_parallel: TensorParallel | None = None
    ) -> None:
        super().__init__()
        self.epsilon, self.tensor_parallel = epsilon, tensor_parallel or TensorParallel()
        self.weight = _replicated(torch.ones(size))
        self.bias = _replicated(torch.zeros(size)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.tensor_parallel.shared
        bias = None if self.bias is None else shared(self.bias)
        return F.layer_norm(x, x.shape[-1:], shared(self.weight), bias, self.epsilon)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight. Lies between the layers of `tensor_parallel`."""

    def __init__(self, size: int, *, epsilon: float = 1e-5, tensor_parallel: TensorParallel | None = None) -> None:
        super().__init__()
        self.epsilon, self.tensor_parallel = epsilon, tensor_parallel or TensorParallel()
        self.weight = _replicated(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensor_parallel.shared(self.weight), self.epsilon)


def normalization(
    kind: str, size: int, *, epsilon: float, bias: bool, tensor_parallel: TensorParallel | None = None
) -> LayerNorm | RMSNorm:
    """The layer for `kind`, `layernorm` or `rmsnorm` (which never has a bias)."""
    if kind == "layernorm":
        return LayerNorm(size, epsilon=epsilon, bias=bias, tensor_parallel=tensor_parallel)
    if kind == "rmsnorm":
        return RMSNorm(size, epsilon=epsilon, tensor_parallel=tensor_parallel)
    raise ValueError(f"normalization: {kind!r} is unknown; must be one of layernorm, rmsnorm")


def _replicated(values: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    ShardSpec(tuple(values.shape)).declare(parameter)
    return parameter
