"""The elementwise operators on CPUs, in C++ (elementwise.cpp): each goes through its tensors once, and keeps for the
backward pass what it has read. ``why_not`` says where they cannot run; what they compute is in ``reference``.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler

SOURCE = Path(__file__).with_name("elementwise.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FUNCTIONS = {"gelu": 0, "silu": 1}


def why_not(device: str, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a type of device; None where they can. Builds them, if nothing else forbids it.

    planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"they run on cpu, not on {device}"
    return no_compiler() if planned else build_failure(SOURCE)


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``; without gradients only its forward pass, as autograd's part takes longer than one token's."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(_KeepsNothing(), *arguments)


class _KeepsNothing:
    """In place of autograd's context, where no backward pass comes."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


class Activate(torch.autograd.Function):
    """``Activate.apply(x, name)`` of FUNCTIONS, element by element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name, y = name, torch.empty_like(x)
        _library().megasparse_activate(
            TYPES[x.dtype], FUNCTIONS[name], *_flat(x), y.data_ptr(), torch.get_num_threads()
        )
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), dy = ctx.saved_tensors, gradients[0].contiguous()
        dx, kind = torch.empty_like(x), (TYPES[x.dtype], FUNCTIONS[ctx.name])
        threads = torch.get_num_threads()
        _library().megasparse_activate_backward(*kind, dy.data_ptr(), *_flat(x), dx.data_ptr(), threads)
        return dx, None


class Gate(torch.autograd.Function):
    """``Gate.apply(x, name)``: the function of the first half of the last dimension times its second half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.name, y = name, x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        kind = TYPES[x.dtype], FUNCTIONS[name]
        _library().megasparse_gate(*kind, x.data_ptr(), *_rows(y), y.data_ptr(), torch.get_num_threads())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), dy = ctx.saved_tensors, gradients[0].contiguous()
        dx, kind = torch.empty_like(x), (TYPES[x.dtype], FUNCTIONS[ctx.name])
        threads = torch.get_num_threads()
        _library().megasparse_gate_backward(*kind, dy.data_ptr(), x.data_ptr(), *_rows(dy), dx.data_ptr(), threads)
        return dx, None


class Normalize(torch.autograd.Function):
    """``Normalize.apply(x, weight, bias, epsilon, centred)`` over the last dimension; centred: without the mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, centred: bool) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rows, width = _rows(x)
        y, moments = torch.empty_like(x), x.new_empty(rows, 2, dtype=torch.float32)
        _library().megasparse_normalize(
            *(TYPES[x.dtype], x.data_ptr(), weight.data_ptr(), None if bias is None else bias.contiguous().data_ptr()),
            *(rows, width, epsilon, centred, y.data_ptr(), moments.data_ptr(), torch.get_num_threads()),
        )
        ctx.save_for_backward(x, weight, moments)
        ctx.centred, ctx.has_bias = centred, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, moments), dy = ctx.saved_tensors, gradients[0].contiguous()
        rows, width = _rows(x)
        library, dx = _library(), torch.empty_like(x)
        dweight = x.new_empty(width, dtype=torch.float32)
        dbias = torch.empty_like(dweight) if ctx.has_bias else None
        sums = torch.empty(library.megasparse_normalize_sums(rows, width), dtype=torch.float32)
        library.megasparse_normalize_backward(
            *(TYPES[x.dtype], dy.data_ptr(), x.data_ptr(), weight.data_ptr(), moments.data_ptr(), rows, width),
            *(ctx.centred, dx.data_ptr(), dweight.data_ptr(), None if dbias is None else dbias.data_ptr()),
            *(sums.data_ptr(), torch.get_num_threads()),
        )
        return dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype), None, None


class Rotate(torch.autograd.Function):
    """``Rotate.apply(x_BHTD, cos_TD, sin_TD)``; the result lies in memory as [B, T, H, D], as projections leave it."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotated(x_BHTD, cos_TD, sin_TD, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotated(gradients[0], cos_TD, sin_TD, -1.0), None, None


def _rotated(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, direction: float) -> Tensor:
    x_BTHD = x_BHTD.transpose(1, 2)
    if x_BTHD.stride(-1) != 1:
        x_BTHD = x_BTHD.contiguous()
    y_BTHD = x_BTHD.new_empty(x_BTHD.shape)
    strides, sizes = (ctypes.c_int64 * 4)(*x_BTHD.stride()), (ctypes.c_int64 * 4)(*x_BTHD.shape)
    _library().megasparse_rotate(
        *(TYPES[x_BTHD.dtype], x_BTHD.data_ptr(), strides, sizes, cos_TD.data_ptr(), sin_TD.data_ptr()),
        *(direction, y_BTHD.data_ptr(), torch.get_num_threads()),
    )
    return y_BTHD.transpose(1, 2)


def _flat(x: Tensor) -> tuple[int, int]:
    """Address and number of elements."""
    return x.data_ptr(), x.numel()


def _rows(x: Tensor) -> tuple[int, int]:
    """Number of rows, and their width."""
    width = x.shape[-1]
    return x.numel() // max(width, 1), width


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    address, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    kind = [number, number]
    arguments = {
        "activate": [*kind, address, size, address, number],
        "activate_backward": [*kind, address, address, size, address, number],
        "gate": [*kind, address, size, size, address, number],
        "gate_backward": [*kind, address, address, size, size, address, number],
        "normalize": [number, *[address] * 3, size, size, real, number, address, address, number],
        "normalize_backward": [number, *[address] * 4, size, size, number, *[address] * 4, number],
        "rotate": [number, *[address] * 5, real, address, number],
    }
    for name, types in arguments.items():
        function = getattr(library, f"megasparse_{name}")
        function.restype, function.argtypes = None, types
    library.megasparse_normalize_sums.restype = size
    library.megasparse_normalize_sums.argtypes = [size, size]
    return library
