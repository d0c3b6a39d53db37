"""The sparse linear layer on CPUs: products over active blocks in C++ (block_products.cpp), float32 and bfloat16.

Work and scratch memory are proportional to the active blocks and, for the weight gradient, to a tile of tokens;
sums are made in float32. The same code reads and writes both storages where they lie. The library is built on first
use (``common.build``). ``why_not`` says where it cannot run.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.storage import Places, places_by_columns, places_by_rows, weight_shape
from megasparse.kernels.common.build import build_failure, load_library, no_compiler

SOURCE = Path(__file__).with_name("block_products.cpp")
DTYPES = (torch.float32, torch.bfloat16)
UNITS = (16, 32, 64, 128)


def why_not(device: str, dtype: torch.dtype, block_size: int, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a device type with a dtype and a block side; None where they can.

    Builds them, if nothing else is in the way; planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"they run on cpu, not on {device}"
    if dtype not in DTYPES:
        return f"dtype {dtype}; supported: {', '.join(map(str, DTYPES))}"
    if block_size not in UNITS:
        return f"sparsity.block_size {block_size}; supported: {', '.join(map(str, UNITS))}"
    return no_compiler() if planned else build_failure(SOURCE)


def forward(x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See ``linear``."""
    return _product(x_NI, weight, True, bias, index)


def backward(
    dy_NO: Tensor, x_NI: Tensor, weight: Tensor, index: BlockIndex, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See ``linear``."""
    dx = _product(dy_NO, weight, False, None, index) if needs[0] else None
    dweight, dbias = _weight_gradient(dy_NO, x_NI, index, needs[2]) if needs[1] else (None, None)
    if needs[2] and dbias is None:
        dbias = dy_NO.sum(0, dtype=torch.float32).to(dy_NO.dtype)
    return dx, dweight, dbias


def _product(a: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """a W^T (transposed) or a W over the blocks of each output group: [N, outputs]."""
    a, weight = _readable(a), weight.contiguous() if index.is_packed else _readable(weight)
    if transposed:
        offsets, indices, places = index.row_offsets, index.columns, places_by_rows(weight, index)
    else:
        offsets, indices, places = index.column_offsets, index.column_rows, places_by_columns(weight, index)
    num_groups, block_size = offsets.numel() - 1, index.block_size
    c = a.new_empty(a.shape[0], num_groups * block_size)
    library, is_bfloat16, threads = _library(), a.dtype == torch.bfloat16, torch.get_num_threads()
    size = library.megasparse_product_scratch(is_bfloat16, num_groups, offsets.data_ptr(), block_size, threads)
    scratch = torch.empty(size, dtype=torch.uint8)
    library.megasparse_product(
        *(is_bfloat16, *_matrix(a), a.shape[0], weight.data_ptr(), *_numbers(places)),
        *(transposed, None if bias is None else bias.data_ptr()),
        *(*_matrix(c), num_groups, offsets.data_ptr(), indices.data_ptr()),
        *(block_size, scratch.data_ptr(), threads),
    )
    return c


def _weight_gradient(dy_NO: Tensor, x_NI: Tensor, index: BlockIndex, needs_bias: bool) -> tuple[Tensor, Tensor | None]:
    dy_NO, x_NI = _readable(dy_NO), _readable(x_NI)
    library, (num_rows, num_columns), block_size = _library(), index.mask.shape, index.block_size
    is_bfloat16 = x_NI.dtype == torch.bfloat16
    size = library.megasparse_gradient_scratch(is_bfloat16, num_rows, num_columns, index.num_active, block_size)
    scratch = torch.empty(size, dtype=torch.uint8)
    # Pages that the system hands out zeroed cost nothing until an active block is written.
    dweight = x_NI.new_zeros(weight_shape(index))
    dbias = dy_NO.new_zeros(num_rows * block_size) if needs_bias else None
    lists = index.row_offsets, index.columns, index.rows, index.column_offsets
    library.megasparse_weight_gradient(
        *(is_bfloat16, *_matrix(dy_NO), *_matrix(x_NI), x_NI.shape[0]),
        *(num_rows, num_columns, *(x.data_ptr() for x in lists), block_size),
        *(dweight.data_ptr(), *_numbers(places_by_rows(dweight, index))),
        *(None if dbias is None else dbias.data_ptr(), scratch.data_ptr(), torch.get_num_threads()),
    )
    return dweight, dbias


def _numbers(places: Places) -> tuple[int, int, int, int]:
    return places.places.data_ptr(), places.group_step, places.place_step, places.row_step


def _matrix(matrix: Tensor) -> tuple[int, int]:
    """Address, and the step between rows."""
    return matrix.data_ptr(), matrix.stride(0)


def _readable(matrix: Tensor) -> Tensor:
    """The kernels read rows without gaps, in words of 32 bits."""
    words = matrix.stride(0) * matrix.element_size() % 4 == 0 and matrix.data_ptr() % 4 == 0
    return matrix if matrix.stride(1) == 1 and words else matrix.contiguous()


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    address, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.megasparse_product_scratch.restype = size
    library.megasparse_product_scratch.argtypes = [number, size, address, size, number]
    library.megasparse_gradient_scratch.restype = size
    library.megasparse_gradient_scratch.argtypes = [number, size, size, size, size]
    library.megasparse_product.restype = None
    library.megasparse_product.argtypes = [
        *(number, address, size, size),  # is_bfloat16, a and its stride, tokens
        *(address, address, size, size, size, number, address),  # weight and its places, transposed, bias
        *(address, size, size, address, address),  # c and its stride, groups with their offsets and indices
        *(size, address, number),  # block, scratch, threads
    ]
    library.megasparse_weight_gradient.restype = None
    library.megasparse_weight_gradient.argtypes = [
        *(number, address, size, address, size, size),  # is_bfloat16, dy and x with their strides, tokens
        *(size, size, address, address, address, address, size),  # grid, its four lists, block
        *(address, address, size, size, size),  # dweight and its places
        *(address, address, number),  # dbias, scratch, threads
    ]
    return library
