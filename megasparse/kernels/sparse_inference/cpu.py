"""Products with packed weights on CPUs, in C++ (inference_products.cpp). ``why_not`` says where they cannot run.

A row of the result has the same bits at any number of threads, and whichever rows stand beside it as long as the same
products run: from MANY_ROWS on, matrices of float32 and bfloat16 that are no blocks are unpacked by and by for dense
products. Those of int8 are equal in every layout too.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler
from megasparse.kernels.dense_products import onednn
from megasparse.kernels.sparse_inference.compressed import WORD, CompressedWeight

SOURCE = Path(__file__).with_name("inference_products.cpp")
APART = 64
"""Elements between rows of inputs, so that those of a tile do not fall on one cache set."""
MANY_ROWS = 32
"""Rows of x from which on dense products of unpacked weights are faster: ours reach two thirds of oneDNN's rate."""
PANEL_ROWS = 256
"""Of the weight, that are unpacked at a time."""
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
    x_NI = x.reshape(-1, inputs)
    if len(x_NI) >= MANY_ROWS and weight.dtype != torch.int8 and weight.kind != "blocks":
        y_NO = _by_dense_products(x_NI.detach(), weight, None if bias_O is None else bias_O.detach(), _library())
    else:
        y_NO = _product(x_NI.float().contiguous(), weight, None if bias_O is None else bias_O.float(), _library())
    return y_NO.to(x.dtype).view(*x.shape[:-1], outputs)


def _product(x_NI: Tensor, weight: CompressedWeight, bias_O: Tensor | None, library: ctypes.CDLL) -> Tensor:
    (num_rows, inputs), threads = x_NI.shape, torch.get_num_threads()
    y_NO = torch.empty(num_rows, weight.shape[0], dtype=torch.float32)
    step = inputs if weight.kind == "blocks" else weight.words * WORD
    if num_rows > 1:
        step += APART
    scales_N = None
    if weight.dtype == torch.int8:
        x_NP, scales_N = torch.empty(num_rows, step, dtype=torch.uint8), torch.empty(num_rows, dtype=torch.float32)
        library.megasparse_quantize(
            x_NI.data_ptr(), num_rows, inputs, step, x_NP.data_ptr(), scales_N.data_ptr(), threads
        )
    else:
        x_NP = F.pad(x_NI, (0, step - inputs)) if step > inputs else x_NI
    ends = bias_O, scales_N, weight.scales_O, weight.row_sums_O
    outputs = (*(_address(part) for part in ends), y_NO.data_ptr())
    kind, values = TYPES[weight.dtype], weight.values.data_ptr()
    if weight.kind == "blocks":
        library.megasparse_multiply_blocks(
            *(kind, x_NP.data_ptr(), num_rows, step, weight.block_size, values, _address(weight.offsets)),
            *(_address(weight.columns), weight.shape[0], *outputs, threads),
        )
        return y_NO
    scratch_bytes = library.megasparse_rows_scratch(kind, num_rows, weight.words, threads)
    scratch = torch.empty(scratch_bytes, dtype=torch.uint8) if scratch_bytes else None
    library.megasparse_multiply_rows(
        *(kind, x_NP.data_ptr(), num_rows, step, weight.words, _address(weight.masks), values),
        *(_address(weight.offsets), weight.shape[0], *outputs, _address(scratch), threads),
    )
    return y_NO


def _by_dense_products(x_NI: Tensor, weight: CompressedWeight, bias_O: Tensor | None, library: ctypes.CDLL) -> Tensor:
    """Some rows of the weight at a time are unpacked, and multiplied by oneDNN, those of bfloat16 through torch."""
    (outputs, inputs), threads = weight.shape, torch.get_num_threads()
    dtype = torch.bfloat16 if x_NI.dtype == weight.dtype == torch.bfloat16 else torch.float32
    product = F.linear if onednn.why_not("cpu", dtype) is not None else onednn.product
    x_NI, bias_O = x_NI.to(dtype).contiguous(), None if bias_O is None else bias_O.to(dtype)
    y_NO = x_NI.new_empty(len(x_NI), outputs)
    unpacked = torch.empty(min(PANEL_ROWS, outputs), weight.words * WORD)
    for first in range(0, outputs, PANEL_ROWS):
        last = min(first + PANEL_ROWS, outputs)
        library.megasparse_unpack_rows(
            *(TYPES[weight.dtype], weight.words, _address(weight.masks), weight.values.data_ptr()),
            *(_address(weight.offsets), first, last, unpacked.data_ptr(), threads),
        )
        bias = None if bias_O is None else bias_O[first:last]
        y_NO[:, first:last] = product(x_NI, unpacked[: last - first, :inputs].to(dtype), bias)
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
        "multiply_rows": [number, address, size, size, size, *[address] * 3, size, *[address] * 6, number],
        "unpack_rows": [number, size, *[address] * 3, size, size, address, number],
        "multiply_blocks": [number, address, size, size, size, *[address] * 3, size, *[address] * 5, number],
    }
    for name, types in arguments.items():
        function = getattr(library, f"megasparse_{name}")
        function.restype, function.argtypes = None, types
    library.megasparse_rows_scratch.restype = size
    library.megasparse_rows_scratch.argtypes = [number, size, size, number]
    return library
