"""Transposed copies of bfloat16 matrices on CPUs (transpose.cpp): ``transpose_into(target, x)``, ``transposed(x)``.

torch copies them element by element on one thread, which takes as long as half of a product in tile registers. Where
nothing can be built, torch's copy is what there is.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library

SOURCE = Path(__file__).with_name("transpose.cpp")


def transposed(matrix: Tensor) -> Tensor:
    """A contiguous copy of the transposed matrix, [columns, rows] of [rows, columns]."""
    target = matrix.new_empty(matrix.shape[1], matrix.shape[0])
    transpose_into(target, matrix)
    return target


def transpose_into(target: Tensor, matrix: Tensor) -> None:
    """target [columns, rows] = matrix^T; both bfloat16 on a CPU."""
    rows, columns = matrix.shape
    assert target.shape == (columns, rows) and target.dtype == matrix.dtype == torch.bfloat16
    if 1 not in (matrix.stride(1), columns) or 1 not in (target.stride(1), rows) or build_failure(SOURCE) is not None:
        target.copy_(matrix.t())
        return
    _library().megasparse_transpose(
        *(matrix.data_ptr(), matrix.stride(0), rows, columns, target.data_ptr(), target.stride(0)),
        torch.get_num_threads(),
    )


@cache
def _library() -> ctypes.CDLL:
    library = load_library(SOURCE)
    library.megasparse_transpose.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    ]
    library.megasparse_transpose.restype = None
    return library
