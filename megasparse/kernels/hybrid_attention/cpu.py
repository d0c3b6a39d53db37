"""Hybrid sparse attention on CPUs in C++ (attention.cpp): float32, bfloat16 and float16, all patterns.

Heads of all patterns and offsets run in one call. The library is built on first use (``common.build``); ``why_not``
says where it cannot run. Memory is linear in T: each thread packs one head at a time, in float32, or in bfloat16 where
the processor multiplies that in tile registers.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

import ctypes
import math
import operator
from collections import Counter
from collections.abc import Callable
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from megasparse.kernels.common.build import build_failure, load_library, no_compiler
from megasparse.kernels.common.compiling import constant_when_compiled
from megasparse.kernels.hybrid_attention.heads import Heads, unit_stride

SOURCE = Path(__file__).with_name("attention.cpp")
PATTERNS = ("full", "local", "strided", "sparse", "fixed")  # the order of attention.cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the order of `Call::type`

# Tiles of attention.cpp: rows of a tile, and the sides of what is computed at once, without AVX-512 and AMX. With
# their larger registers some scores more are computed.
TILE, ROWS, COLUMNS = 24, 6, 16


@constant_when_compiled  # it looks for files, which cannot be traced
def why_not(device: str, dtype: torch.dtype, head_dim: int = 0, planned: bool = False) -> str | None:
    """Why the kernel cannot run on a device type with a dtype, at any head dimension; None where it can.

    Builds it, if nothing else is in the way; planned: says what can be told without a build.
    """
    if device != "cpu":
        return f"it runs on cpu, not on {device}"
    if dtype not in DTYPES:
        return f"dtype {dtype}; supported: {', '.join(map(str, DTYPES))}"
    return no_compiler() if planned else build_failure(SOURCE)


def forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> None:
    """See `operators.py`. lse: the base 2 logarithm of the sum over the visible keys of 2^(log2(e) score)."""
    _run(False, {"q": unit_stride(q), "k": unit_stride(k), "v": unit_stride(v), "out": out}, lse, heads)


def backward(
    gradients: tuple[Tensor, ...], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: Heads
) -> None:
    """See `operators.py`."""
    tensors = {name: unit_stride(x) for name, x in {"q": q, "k": k, "v": v, "out": out, "dout": dout}.items()}
    tensors.update(zip(("dq", "dk", "dv"), gradients, strict=True))
    _run(True, tensors, lse.contiguous(), heads)


class _Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("sample", "head", "token"))]


class _Call(ctypes.Structure):
    """`Call` in attention.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("type", "samples", "heads", "key_heads", "length", "width")),
        ("stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("patterns", "offsets", "document_starts", "document_ends")),
        *((name, _Operand) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "scratch")),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


def _run(backward: bool, tensors: dict[str, Tensor], lse: Tensor, heads: Heads) -> None:
    q, key_heads, stride, offsets = tensors["q"], tensors["k"].shape[1], heads.stride, heads.offsets
    B, H, T, D = q.shape
    patterns = [PATTERNS.index(name) for name in heads.patterns]
    assert len(patterns) == len(offsets) == H, (patterns, offsets, q.shape)
    assert all(0 <= offset < stride for offset in offsets), (offsets, stride)
    library, (starts, ends) = _library(), heads.document_bounds()
    per_head = (ctypes.c_int64 * H)(*patterns), (ctypes.c_int64 * H)(*offsets)
    call = _Call(DTYPES.index(q.dtype), B, H, key_heads, T, D, stride, *map(ctypes.addressof, per_head))
    if starts is not None and ends is not None:
        call.document_starts, call.document_ends = starts.data_ptr(), ends.data_ptr()
    for name, x in tensors.items():
        setattr(call, name, _Operand(x.data_ptr(), *x.stride()[:3]))
    call.threads = min(torch.get_num_threads(), B * (key_heads if backward else H))
    scratch = torch.empty(call.threads * library.megasparse_attention_scratch(call, backward), dtype=torch.float32)
    call.lse, call.scratch, call.scale = lse.data_ptr(), scratch.data_ptr(), 1 / math.sqrt(D)
    (library.megasparse_attention_backward if backward else library.megasparse_attention_forward)(call)


@lru_cache(maxsize=256)
def executed_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Scores computed per head in the forward pass: rows of register tiles times the columns that any sees."""
    everything = seq_length, seq_length
    if pattern == "full":
        return _entries(*everything, lambda q: 0, lambda q: q + 1)
    if pattern == "fixed":
        blocks = _entries(*everything, lambda q: (q + offset) // stride * stride - offset, lambda q: q + 1)
        num_summaries = _count(stride - 1 - offset, stride, seq_length)
        return blocks + _entries(seq_length, num_summaries, lambda q: 0, lambda q: (q + offset) // stride)
    if pattern == "strided":
        itself = _entries(*everything, lambda q: q, lambda q: q + 1) if offset else 0
        return itself + _residue_entries(seq_length, stride, offset, far=False)
    window = _entries(*everything, lambda q: q - stride + 1, lambda q: q + 1)
    return window + (_residue_entries(seq_length, stride, offset, far=True) if pattern == "sparse" else 0)


def _residue_entries(seq_length: int, stride: int, offset: int, far: bool) -> int:
    """The strided keys of all queries. far: without those in the window."""
    shapes: Counter[tuple[int, int, int]] = Counter()
    for residue in range(min(stride, seq_length) if not far or stride < seq_length else 0):
        key_residue = (residue - offset) % stride
        # The last key that query number i sees is number i - lag.
        lag = (residue < key_residue) + far
        shapes[_count(residue, stride, seq_length), _count(key_residue, stride, seq_length), lag] += 1
    return sum(
        times * _entries(queries, keys, lambda q: 0, partial(operator.add, 1 - lag))
        for (queries, keys, lag), times in shapes.items()
    )


def _count(start: int, step: int, end: int) -> int:
    return len(range(start, end, step))


def _entries(num_queries: int, num_keys: int, first: Callable[[int], int], last: Callable[[int], int]) -> int:
    """Both functions of a query never decrease: the first key that it sees, and one more than the last."""
    total = 0
    for start in range(0, num_queries, TILE):
        rows = min(TILE, num_queries - start)
        groups = -(-rows // ROWS)
        for group in range(groups):
            top, bottom = start + group * rows // groups, start + (group + 1) * rows // groups
            begin, end = max(first(top), 0), min(last(bottom - 1), num_keys)
            if begin < end:
                total += (bottom - top) * (-(-end // COLUMNS) - begin // COLUMNS) * COLUMNS
    return total


@cache
def _library() -> ctypes.CDLL:
    return declare(load_library(SOURCE))


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    call = ctypes.POINTER(_Call)
    library.megasparse_attention_scratch.restype = ctypes.c_int64
    library.megasparse_attention_scratch.argtypes = [call, ctypes.c_int]
    for function in (library.megasparse_attention_forward, library.megasparse_attention_backward):
        function.restype, function.argtypes = None, [call]
    return library
