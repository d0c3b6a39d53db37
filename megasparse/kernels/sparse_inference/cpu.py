"""Products with packed weights on CPUs, in C++ (inference_products.cpp). ``why_not`` says where they cannot run.

A row of the result has the same bits whichever rows stand beside it, at any number of threads; those of int8 also in
every layout.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler
from megasparse.kernels.sparse_inference.compressed import WORD, CompressedWeight

SOURCE = Path(__file__).with_name("inference_products.cpp")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def why_not(device: str, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a type of device; None where they can. Builds them, if nothing else forbids it.

    planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"they run on cpu, not on {device}"
    return no_compiler() if planned else build_failure(SOURCE)


def compressed_linear(x: Tensor, weight: CompressedWeight, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., O] in the dtype of `x`.

    Args:
        x: [..., I], a floating dtype, on the CPU; widened to float32, and with int8 weights rounded to int8 by row:
            symmetric, the largest entry becomes 127.
        weight: of ``compress``.
        bias_O: [O] or None.

    Raises:
        RuntimeError: a gradient is wanted, or the kernels cannot be built.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError("compressed_linear: packed weights are for inference; must run under torch.no_grad()")
    outputs, inputs = weight.shape
    assert x.shape[-1] == inputs, f"{tuple(x.shape)}, weight {weight.shape}"
    x_NI = x.detach().reshape(-1, inputs).float().contiguous()
    y_NO = _product(x_NI, weight, None if bias_O is None else bias_O.detach().float().contiguous(), _library())
    return y_NO.to(x.dtype).view(*x.shape[:-1], outputs)


def _product(x_NI: Tensor, weight: CompressedWeight, bias_O: Tensor | None, library: ctypes.CDLL) -> Tensor:
    (num_rows, inputs), threads = x_NI.shape, torch.get_num_threads()
    y_NO = x_NI.new_empty(num_rows, weight.shape[0])
    padded = inputs if weight.kind == "blocks" else weight.words * WORD
    scales_N = None
    if weight.dtype == torch.int8:
        x_NP, scales_N = torch.empty(num_rows, padded, dtype=torch.uint8), x_NI.new_empty(num_rows)
        library.megasparse_quantize(
            x_NI.data_ptr(), num_rows, inputs, padded, x_NP.data_ptr(), scales_N.data_ptr(), threads
        )
    else:
        x_NP = F.pad(x_NI, (0, padded - inputs)) if padded > inputs else x_NI
    ends = bias_O, scales_N, weight.scales_O, weight.row_sums_O
    outputs = (*(_address(part) for part in ends), y_NO.data_ptr())
    kind, values = TYPES[weight.dtype], weight.values.data_ptr()
    if weight.kind == "blocks":
        library.megasparse_multiply_blocks(
            *(kind, x_NP.data_ptr(), num_rows, padded, weight.block_size, values, _address(weight.offsets)),
            *(_address(weight.columns), weight.shape[0], *outputs, threads),
        )
        return y_NO
    scratch = torch.empty(library.megasparse_rows_scratch(kind, weight.words, threads), dtype=torch.uint8)
    library.megasparse_multiply_rows(
        *(kind, x_NP.data_ptr(), num_rows, weight.words, _address(weight.masks), values, _address(weight.offsets)),
        *(weight.shape[0], *outputs, scratch.data_ptr(), threads),
    )
    return y_NO


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    arguments = {
        "quantize": [address, size, size, size, address, address, number],
        "multiply_rows": [number, address, size, size, *[address] * 3, size, *[address] * 6, number],
        "multiply_blocks": [number, address, size, size, size, *[address] * 3, size, *[address] * 5, number],
    }
    for name, types in arguments.items():
        function = getattr(library, f"megasparse_{name}")
        function.restype, function.argtypes = None, types
    library.megasparse_rows_scratch.restype = size
    library.megasparse_rows_scratch.argtypes = [number, size, number]
    return library
