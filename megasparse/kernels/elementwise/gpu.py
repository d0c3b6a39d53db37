"""The elementwise operators on GPUs that torch leaves to several kernels: the gate of SwiGLU, rotary positions, and the
residual sum with the norm that follows, each in one Triton kernel forward and one backward.

By the count of tensors that go through memory, of the size of the result, forward and backward: gate 3 and 5 instead of
5 and 13, rotation 2 each way instead of about 11, some of them float32, sum and norm 4 and 4 instead of 5 and 6. GELU,
and a norm by itself, are one kernel each way in torch, and stay there. Not measured on a GPU yet.

Where they run, and with which dtypes: ``common.triton_device``. Triton is imported on first use.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.common import triton_device
from megasparse.kernels.common.triton_device import power_of_two

MAX_WIDTH = 2**14
"""Of a norm: a row lies in the registers of one program."""
GATE_COLUMNS, ROTATED_PAIRS = 1024, 2048
"""Of one program: 8 or 16 for each of 128 threads, which is one load of 16 bytes or two."""
GRADIENT_PROGRAMS = 512
"""Of the gradient of a norm, at most: about four for each processor. Each leaves a row of sums for the weight."""


def why_not(device: str, dtype: torch.dtype, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a device type with a dtype; None where they can.

    planned: says what can be told where the GPU is not.
    """
    reason = triton_device.wrong_type(device, dtype) or triton_device.missing_triton()
    return reason or (triton_device.unsuited_device() if device == "cuda" and not planned else None)


class Gate(torch.autograd.Function):
    """``Gate.apply(x)``: silu of the first half of the last dimension times its second half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        _gate("gate_kernel", y, (x, y))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, gradients[0].contiguous()
        dx = torch.empty_like(x)
        _gate("gate_gradient_kernel", dy, (dy, x, dx))
        return dx


def _gate(name: str, like: Tensor, pointers: tuple[Tensor, ...]) -> None:
    """like: of the shape of the result of a gate."""
    if not like.numel():
        return
    width = like.shape[-1]
    with triton_device.current(like.device):
        grid = (like.numel() // width, -(-width // GATE_COLUMNS))
        getattr(_kernels(), name)[grid](*pointers, width, COLUMNS=GATE_COLUMNS)


class Rotate(torch.autograd.Function):
    """``Rotate.apply(x_BHTD, cos_TD, sin_TD)``; the result lies in memory as [B, T, H, D], as projections leave it."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotated(x_BHTD, cos_TD, sin_TD, backwards=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotated(gradients[0], cos_TD, sin_TD, backwards=True), None, None


def _rotated(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, backwards: bool) -> Tensor:
    if x_BHTD.stride(-1) != 1:
        x_BHTD = x_BHTD.contiguous()
    B, H, T, D = x_BHTD.shape
    y_BTHD = x_BHTD.new_empty(B, T, H, D)
    width = power_of_two(D // 2)
    rows = max(1, ROTATED_PAIRS // width)
    if y_BTHD.numel():
        with triton_device.current(x_BHTD.device):
            _kernels().rotate_kernel[(-(-B * T * H // rows),)](
                *(x_BHTD, cos_TD, sin_TD, y_BTHD, B * T * H, T, H, x_BHTD.stride()[:3]),
                HALF=D // 2,
                WIDTH=width,
                ROWS=rows,
                BACKWARDS=backwards,
            )
    return y_BTHD.transpose(1, 2)


class NormalizeSum(torch.autograd.Function):
    """``NormalizeSum.apply(x, added, weight, bias, epsilon, centred)`` -> x + added, and its normalisation over the
    last dimension; centred: without the mean."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool
    ) -> tuple[Tensor, Tensor]:
        x, added, weight = x.contiguous(), added.contiguous(), weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total, y = torch.empty_like(x), torch.empty_like(x)
        moments = x.new_empty(rows, 2, dtype=torch.float32)
        if rows:
            with triton_device.current(x.device):
                _kernels().normalize_kernel[(rows,)](
                    *(x, added, weight, bias, total, y, moments, width, epsilon), CENTRED=centred, **_row(width)
                )
        ctx.save_for_backward(total, weight, moments)
        ctx.centred, ctx.has_bias = centred, bias is not None
        return total, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, moments = ctx.saved_tensors
        dtotal, dy = (gradient.contiguous() for gradient in gradients)
        rows, width = moments.shape[0], total.shape[-1]
        programs = min(rows, GRADIENT_PROGRAMS)
        dx, dweight = torch.empty_like(total), total.new_empty(programs, width, dtype=torch.float32)
        dbias = torch.empty_like(dweight) if ctx.has_bias else None
        if rows:
            with triton_device.current(total.device):
                _kernels().normalize_gradient_kernel[(programs,)](
                    *(dy, dtotal, total, weight, moments, dx, dweight, dbias, rows, -(-rows // programs), width),
                    CENTRED=ctx.centred,
                    **_row(width),
                )
        sums = (None if each is None else each.sum(0).to(weight.dtype) for each in (dweight, dbias))
        return dx, dx, *sums, None, None


def _row(width: int) -> dict[str, int]:
    """Of programs that hold rows: up to 16 elements for each thread."""
    return {"WIDTH": power_of_two(width), "num_warps": min(16, max(1, power_of_two(width) // 512))}


@cache
def _kernels() -> ModuleType:
    from megasparse.kernels.elementwise import triton_kernels

    return triton_kernels
