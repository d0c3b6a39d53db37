"""What a block adds to the residual stream: a branch, which a training method may scale or leave out of a step.

    x = x + scaled_branch(self.attention, scale, normalized, documents)

A branch that is left out is still visited with one token of each sample, and its parameters have gradients of exactly
zero. So every rank comes to the same modules, collectives and gradients in every step: ZeRO stage 3 keeps its order of
gathering (and would else take the gradient of an earlier step for that of a parameter without one), and the optimizer
does the same with the parameters in every stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_branch(branch: Callable[..., Tensor], scale: float, x_BTC: Tensor, *rest: Any) -> Tensor:
    """scale * branch(x, *rest), [B, T, C]; zeros where the scale is 0.

    branch: [B, t, C] -> [B, t, C] for any number of tokens, also without `rest`.
    """
    if scale == 0.0:
        return _Visit.apply(branch(x_BTC[:, :1]), x_BTC.shape[1])
    y_BTC = branch(x_BTC, *rest)
    return y_BTC if scale == 1.0 else scale * y_BTC


class _Visit(torch.autograd.Function):
    """[B, t, C] -> zeros [B, T, C], with a gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, num_tokens: int) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return y.new_zeros(y.shape[0], num_tokens, y.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx.new_zeros(ctx.shape, dtype=ctx.dtype), None
