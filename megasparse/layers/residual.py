"""What a block adds to the residual stream: a branch, which a training method may scale or leave out of a step.

    x = add_branch(x, scale, self.attend, documents)

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


def add_branch(x_BTC: Tensor, scale: float, branch: Callable[..., Tensor], *rest: Any) -> Tensor:
    """x + scale * branch(x, *rest), [B, T, C]; x itself where the scale is 0.

    branch: [B, t, C] -> [B, t, C] for any number of tokens, also without `rest`.
    """
    if scale == 0.0:
        return _Visit.apply(x_BTC, branch(x_BTC[:, :1]))
    y_BTC = branch(x_BTC, *rest)
    return x_BTC + (y_BTC if scale == 1.0 else scale * y_BTC)


class _Visit(torch.autograd.Function):
    """(x, y) -> x, with a gradient of zeros for y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = y.shape, y.dtype
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, Tensor]:
        return dx, dx.new_zeros(ctx.shape, dtype=ctx.dtype)
