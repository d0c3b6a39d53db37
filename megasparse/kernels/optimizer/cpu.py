"""AdamW and the square of the gradient norm on CPUs, in C++ (adamw.cpp), over active blocks.

``why_not`` says where they cannot run; what they compute is in ``reference``. Blocks of one weight are not looked for:
a vector almost always holds an active one.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler
from megasparse.kernels.optimizer.reference import MAX_WEIGHT_STEPS, Active, AdamWStep, State, correction

SOURCE = Path(__file__).with_name("adamw.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not(device: str, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a type of device; None where they can. Builds them, if nothing else forbids it.

    planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"it runs on cpu, not on {device}"
    return no_compiler() if planned else build_failure(SOURCE)


class Extent(ctypes.Structure):
    """What of a piece is active."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "start", "block", "columns")] + [
        ("active", ctypes.c_void_p)
    ]


class Numbers(ctypes.Structure):
    """Of a step, in float32."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("gradient_scale", "keep", "new1", "beta2", "new2", "epsilon")),
        *((name, ctypes.c_float) for name in ("step_size", "root", "lr", "correction1", "correction2", "ramp")),
        *((name, ctypes.c_int32) for name in ("regrown_below", "most_steps")),
    ]


class Tensors(ctypes.Structure):
    """Addresses."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("gradient", "master", "first", "second", "low", "steps", "corrections1", "corrections2")
    ]


def adamw_(state: State, gradient: Tensor, numbers: AdamWStep, active: Active | None = None) -> None:
    """``reference.adamw_`` of the active blocks; inactive entries, steps among them, are left as they are.

    gradient: [numel], float32, bfloat16 or float16. active: None: everything is.
    """
    tensors = [gradient, state.master, state.exp_avg, state.exp_avg_sq, state.low, state.weight_steps]
    assert all(x is None or (x.is_contiguous() and x.numel() == gradient.numel()) for x in tensors)
    assert state.master.dtype == state.exp_avg.dtype == state.exp_avg_sq.dtype == torch.float32
    tables: list[Tensor | None] = [None, None]
    if numbers.by_weight and state.weight_steps is not None:
        tables = [_corrections(beta) for beta in (numbers.beta1, numbers.beta2)]
    addresses = Tensors(*(None if x is None else x.data_ptr() for x in (*tensors, *tables)))
    _library().megasparse_adamw(
        *(TYPES[gradient.dtype], TYPES[torch.float32 if state.low is None else state.low.dtype]),
        *(ctypes.byref(_extent(gradient, active)), ctypes.byref(addresses), ctypes.byref(_numbers(numbers))),
        torch.get_num_threads(),
    )


def square_sum(gradient: Tensor, active: Active | None = None) -> float:
    """Sum of the squares of the entries in active blocks: in float32 over 4,096 of them, then in float64."""
    assert gradient.is_contiguous()
    extent, library = ctypes.byref(_extent(gradient, active)), _library()
    sums = (ctypes.c_double * library.megasparse_square_sums(extent))()
    return library.megasparse_square_sum(
        TYPES[gradient.dtype], extent, gradient.data_ptr(), sums, torch.get_num_threads()
    )


def _extent(piece: Tensor, active: Active | None) -> Extent:
    if active is None or active.block_size == 1:
        return Extent(piece.numel(), 0, 1, 0, None)
    mask, side = active.mask, active.block_size
    assert mask.dtype == torch.bool and mask.is_contiguous() and mask.device.type == "cpu"
    assert active.start + piece.numel() <= mask.numel() * side**2
    return Extent(piece.numel(), active.start, side, mask.shape[1], mask.data_ptr())


def _numbers(step: AdamWStep) -> Numbers:
    correction1, correction2 = 1 - step.beta1**step.step, 1 - step.beta2**step.step
    return Numbers(
        gradient_scale=step.gradient_scale,
        keep=1 - step.lr * step.weight_decay,
        new1=1 - step.beta1,
        beta2=step.beta2,
        new2=1 - step.beta2,
        epsilon=step.epsilon,
        step_size=step.lr / correction1,
        root=math.sqrt(correction2),
        lr=step.lr,
        correction1=correction1,
        correction2=correction2,
        ramp=step.regrowth_warmup_steps,
        regrown_below=min(step.step, MAX_WEIGHT_STEPS),
        most_steps=MAX_WEIGHT_STEPS,
    )


@cache
def _corrections(beta: float) -> Tensor:
    """``correction`` for every count that a weight can have."""
    return correction(beta, torch.arange(MAX_WEIGHT_STEPS + 1, dtype=torch.float32))


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    address, number = ctypes.c_void_p, ctypes.c_int
    library.megasparse_adamw.restype = None
    library.megasparse_adamw.argtypes = [number, number, address, address, address, number]
    library.megasparse_square_sums.restype = ctypes.c_int64
    library.megasparse_square_sums.argtypes = [address]
    library.megasparse_square_sum.restype = ctypes.c_double
    library.megasparse_square_sum.argtypes = [number, address, address, address, number]
    return library
