"""Cross entropy and its gradient on CPUs, in C++ (cross_entropy.cpp): a row of logits is read once and written once,
and no float32 copy of logits of another dtype is made. ``why_not`` says where it cannot run.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler

SOURCE = Path(__file__).with_name("cross_entropy.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MEASURE, WRITE = 1, 2

Joined = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def why_not(device: str, planned: bool = False) -> str | None:
    """Why this kernel cannot run on a type of device; None where it can. Builds it, if nothing else forbids it.

    planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"they run on cpu, not on {device}"
    return no_compiler() if planned else build_failure(SOURCE)


def cross_entropy_(
    logits_NW: Tensor, targets_N: Tensor, width: int, wants_gradient: bool, joined: Joined | None
) -> Tensor:
    """See ``reference``."""
    assert logits_NW.stride(1) == 1 and targets_N.dtype == torch.int64
    targets_N = targets_N.contiguous()
    largest_N, sums_N, picked_N = torch.empty(3, len(logits_NW), dtype=torch.float32)

    def run(phases: int) -> None:
        _library().megasparse_cross_entropy(
            *(TYPES[logits_NW.dtype], logits_NW.data_ptr(), logits_NW.stride(0), len(logits_NW)),
            *(width, logits_NW.shape[1], targets_N.data_ptr(), phases),
            *(x.data_ptr() for x in (largest_N, sums_N, picked_N)),
            torch.get_num_threads(),
        )

    # One rank knows all of a row, and need not come back to it.
    run(MEASURE | WRITE if wants_gradient and joined is None else MEASURE)
    if joined is not None:
        found = joined(largest_N, sums_N, picked_N)
        for own, whole in zip((largest_N, sums_N, picked_N), found, strict=True):
            own.copy_(whole)
        if wants_gradient:
            run(WRITE)
    return sums_N.log() - (picked_N - largest_N)


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.megasparse_cross_entropy.restype = None
    library.megasparse_cross_entropy.argtypes = [
        *(number, address, size, size, size, size),  # type, logits and their stride, rows, width, padded
        *(address, number, address, address, address, number),  # targets, phases, largest, sums, picked, threads
    ]
    return library
