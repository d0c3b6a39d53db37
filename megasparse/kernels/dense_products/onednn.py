"""Linear layers on CPUs by oneDNN, which torch carries: ``linear(x_NI, weight, bias)``.

``why_not`` says where it cannot run. In float32, which torch gives to MKL, the operator is one that torch's own
compiler uses and promises to nobody, so it is tried on a small product first; in all shapes that were tried a row has
the same bits at any number of threads and whichever rows stand beside it (tests/kernels/test_dense_products.py). In
bfloat16 torch's products are oneDNN's, whose bits depend on the threads; here they get their operands as they are
multiplied fastest (``pieces``).

Names: N tokens, I input width, O output width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.dense_products import pieces

LARGE = 2**20
"""Weights of a matrix from which on its gradient is worth a copy of the input."""


def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why oneDNN's products cannot take the place of torch's on a type of device; None where they can."""
    if device != "cpu":
        return f"they run on cpu, not on {device}"
    if dtype == torch.bfloat16:
        return None if _multiplies_bfloat16() else "oneDNN multiplies no bfloat16 on this processor"
    return _failure() if dtype == torch.float32 else f"dtype {dtype}; supported: torch.float32, torch.bfloat16"


def linear(x_NI: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, [N, O], with gradients; all float32 or all bfloat16 on a CPU."""
    return _Linear.apply(x_NI, weight, bias)


def weight_gradient(dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dy^T x, [O, I].

    For a large one in float32 x is copied first, so that the tokens of an input lie one after the other: on one core of
    an EPYC (Zen 5, under load) that made 191 of 137 GFLOP/s in a head of 768 to 50,304, 192 of 174 from 768 to 3,072,
    but 172 of 190 from 768 to 768.
    """
    if x_NI.dtype == torch.bfloat16:
        return pieces.weight_gradient(_readable(dy_NO), _readable(x_NI))
    x_IN = x_NI.t()
    return product(dy_NO.t(), x_IN.contiguous() if dy_NO.shape[1] * x_NI.shape[1] >= LARGE else x_IN)


class _Linear(torch.autograd.Function):
    """The gradients are dy W, dy^T x and the sum of dy over the tokens."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_NI, weight)
        return product(x_NI, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_NI, weight = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad
        dx_NI = product(dy_NO, weight.t()) if needs_dx else None
        dweight = weight_gradient(dy_NO, x_NI) if needs_dweight else None
        return dx_NI, dweight, dy_NO.sum(0) if needs_dbias else None


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left right^T + bias, of left [A, K] and right [B, K], all of one dtype."""
    if left.numel() == 0 or right.numel() == 0:
        return torch.nn.functional.linear(left, right, bias)
    if left.dtype == torch.bfloat16:
        return pieces.product(left, right, bias)
    return torch.ops.mkldnn._linear_pointwise(_readable(left), _readable(right), bias, "none", [], "")


def _readable(matrix: Tensor) -> Tensor:
    """Rows or columns that lie one after the other, and do not overlap as those of an expanded tensor do."""
    rows, columns = matrix.shape
    is_plain = matrix.stride(1) == 1 and matrix.stride(0) >= columns
    is_transposed = matrix.stride(0) == 1 and matrix.stride(1) >= rows
    return matrix if is_plain or is_transposed else matrix.contiguous()


@cache
def _multiplies_bfloat16() -> bool:
    """False too where a build of torch does not say."""
    try:
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False


@cache
def _failure() -> str | None:
    """What is wrong with the operator in this torch."""
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, 17, generator=generator) for rows in (5, 19))
    try:
        found = product(left, right), product(left.t().contiguous().t(), right.t().contiguous().t())
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"its operator cannot be called: {str(error).splitlines()[0]}"
    expected = left.double() @ right.double().t()
    if not all(torch.allclose(y.double(), expected, rtol=0, atol=1e-4) for y in found):
        return "its operator computes something else in this torch"
    return None
