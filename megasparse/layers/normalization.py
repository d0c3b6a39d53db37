"""Normalisation over the last dimension. torch computes both kinds in float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.parallel import ShardSpec, TensorParallel


class Normalization(nn.Module):
    """`layernorm`: (x - mean) / sqrt(variance + epsilon) * weight (+ bias). `rmsnorm`: x / sqrt(mean(x^2) + epsilon) *
    weight, never with a bias. Lies between the layers of `tensor_parallel`.

    Raises ValueError for another kind.
    """

    def __init__(
        self, kind: str, size: int, *, epsilon: float, bias: bool, tensor_parallel: TensorParallel | None = None
    ) -> None:
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f"normalization: {kind!r} is unknown; must be one of layernorm, rmsnorm")
        self.kind, self.epsilon, self.tensor_parallel = kind, epsilon, tensor_parallel or TensorParallel()
        self.weight = _replicated(torch.ones(size))
        self.bias = _replicated(torch.zeros(size)) if bias and kind == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared, width = self.tensor_parallel.shared, x.shape[-1:]
        if self.kind == "rmsnorm":
            return F.rms_norm(x, width, shared(self.weight), self.epsilon)
        bias = None if self.bias is None else shared(self.bias)
        return F.layer_norm(x, width, shared(self.weight), bias, self.epsilon)


def _replicated(values: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    ShardSpec(tuple(values.shape)).declare(parameter)
    return parameter
