"""The residual sum of a block with normalisation after it, with weights of its own for what goes past the branch.

    x = norm(sum(x, branch(x)))       with sum(x, f) = omega * x + f

Source: Liu et al. 2020, arXiv 2004.08249 (Admin), equation of section 4.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megasparse.layers.normalization import replicated_ones
from megasparse.parallel import TensorParallel


class ResidualWeight(nn.Module):
    """omega * x + f for x, f [B, T, C], with one learnable omega per entry of the hidden state, at first 1."""

    def __init__(self, size: int, tensor_parallel: TensorParallel) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self.weight = replicated_ones(size)
        self.offset = 0.0
        """Added to omega until a training method has put it into the weight: the gradients are the same."""
        self.measure: Callable[[Tensor], float] | None = None
        """Sees f before the sum of the next training pass, once, and gives the offset."""

    def forward(self, x_BTC: Tensor, f_BTC: Tensor) -> Tensor:
        if self.measure is not None and self.training:
            measure, self.measure = self.measure, None
            self.offset = measure(f_BTC.detach())
        return (self.tensor_parallel.shared(self.weight) + self.offset) * x_BTC + f_BTC


class PlainSum(nn.Module):
    """x + f."""

    def forward(self, x_BTC: Tensor, f_BTC: Tensor) -> Tensor:
        return x_BTC + f_BTC
