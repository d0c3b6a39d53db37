"""Normalisation over the last dimension, computed in float32 whatever the dtype of the input."""

from __future__ import annotations

import torch
from torch import nn

from megasparse.kernels.elementwise import normalize, normalize_sum
from megasparse.parallel import ShardSpec, TensorParallel


class Normalization(nn.Module):
    """`layernorm`: (x - mean) / sqrt(variance + epsilon) * weight (+ bias). `rmsnorm`: x / sqrt(mean(x^2) + epsilon) *
    weight, never with a bias. Lies between the layers of `tensor_parallel`. kernel: of `kernels.elementwise`.

    Raises ValueError for another kind.
    """

    def __init__(
        self,
        kind: str,
        size: int,
        *,
        epsilon: float,
        bias: bool,
        tensor_parallel: TensorParallel | None = None,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f"normalization: {kind!r} is unknown; must be one of layernorm, rmsnorm")
        self.kind, self.epsilon, self.kernel = kind, epsilon, kernel
        self.tensor_parallel = tensor_parallel or TensorParallel()
        self.weight = replicated_ones(size)
        self.bias = _replicated(torch.zeros(size)) if bias and kind == "layernorm" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(x, *self._parameters_here(), self.epsilon, self.kind, kernel=self.kernel)

    def _parameters_here(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        shared = self.tensor_parallel.shared
        return shared(self.weight), None if self.bias is None else shared(self.bias)


class NormalizationOfSum(Normalization):
    """Of what is added to the residual stream: (x, added) -> x + added and its normalisation, in one pass on GPUs."""

    def forward(self, x: torch.Tensor, added: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        return normalize_sum(x, added, *self._parameters_here(), self.epsilon, self.kind, kernel=self.kernel)


def replicated_ones(size: int) -> nn.Parameter:
    """A parameter [size] that all tensor-parallel ranks hold whole."""
    return _replicated(torch.ones(size))


def _replicated(values: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    ShardSpec(tuple(values.shape)).declare(parameter)
    return parameter
