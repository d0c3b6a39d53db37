"""What the Triton kernels of hybrid sparse attention launch: the parts of each pattern, and the tile sizes.

``launches`` says which parts of a pattern are computed together, ``forward_tile`` and the like how large their tiles
are, ``executed_entries`` how many scores that makes. The sizes keep to the shared memory and the registers of sm_80,
sm_90 and gfx942 (tests compile them ahead of time); which are fastest has been measured on no device yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from megasparse.kernels.common.triton_device import power_of_two

# Tokens of one residue from which far keys are tiles of their residue: 16 x 16 is the smallest tile of tensor cores.
# Under `sparse` that costs one launch more, and a pass over what the other launch made.
STRIDED_TILES_FROM, SPARSE_TILES_FROM = 16, 32


@dataclass(frozen=True)
class Launch:
    """The parts that one launch joins; see `triton_kernels.py`."""

    near: str
    far: str
    beyond: bool = False
    """Far keys without those of the window."""


@dataclass(frozen=True)
class Tile:
    """Queries x keys of one tile of scores; far keys that a row takes at a time."""

    queries: int
    keys: int
    chunk: int
    warps: int
    stages: int
    """Steps whose loads are under way at once."""


def launches(pattern: str, seq_length: int, stride: int) -> tuple[Launch, ...]:
    """Launches of the forward pass and of each gradient. `full` is `strided` with s = 1."""
    length = class_length(seq_length, stride)
    if pattern == "local":
        return (Launch("window", "none"),)
    if pattern == "fixed":
        return (Launch("block", "summaries"),)
    if pattern in ("strided", "full"):
        return (Launch("none", "residues" if length >= STRIDED_TILES_FROM else "rows"),)
    assert pattern == "sparse", pattern
    if length < SPARSE_TILES_FROM:
        return (Launch("window", "rows", beyond=True),)
    return Launch("none", "residues", beyond=True), Launch("window", "none")


def class_length(seq_length: int, stride: int) -> int:
    """Tokens of equal position modulo the stride, at most."""
    return -(-seq_length // stride)


def width(head_dim: int) -> int:
    """The head dimension as it lies in a tile: a power of two, at least 16."""
    return max(16, power_of_two(head_dim))


def forward_tile(launch: Launch, length: int, dtype: torch.dtype, head_dim: int, is_hip: bool = False) -> Tile:
    """Tile of the forward pass. `length`: ``class_length``."""
    wide, exact = width(head_dim) > 64, dtype == torch.float32
    # Exact float32 has no tensor cores, and holds whole rows of its operands in registers, as do wide heads on gfx942.
    queries = 32 if exact or is_hip and wide else 64
    keys = 16 if exact else queries
    if launch.far == "residues":
        longest = max(16, power_of_two(length))
        queries, keys = min(queries, longest), min(keys, longest)
    if exact:
        warps = 8
    elif is_hip:
        warps = 4
    else:
        # Rows keep what they load in registers: it is spread over more threads.
        warps = 8 if launch.far == "rows" or wide else queries // 16
    return Tile(queries, keys, chunk=1 if wide else 2, warps=warps, stages=1 if is_hip else 2)


def query_gradient_tile(launch: Launch, length: int, dtype: torch.dtype, head_dim: int, is_hip: bool = False) -> Tile:
    """Tile of the gradient of the queries."""
    tile = forward_tile(launch, length, dtype, head_dim, is_hip)
    # Two more operands than forward: with 64 keys sm_80 would spill registers.
    return replace(tile, keys=min(tile.keys, 32))


def key_gradient_tile(launch: Launch, length: int, dtype: torch.dtype, head_dim: int, is_hip: bool = False) -> Tile:
    """Tile of the gradients of keys and values."""
    tile = forward_tile(launch, length, dtype, head_dim, is_hip)
    # Two sums and two operands stay in registers; a row takes a query and its output gradient for each key.
    return replace(tile, queries=min(tile.keys, 32), keys=tile.queries, chunk=1)


@lru_cache(maxsize=256)
def executed_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Scores that the forward pass computes per head in bfloat16 or float16: tiles as they are, and rows."""
    stride, total = 1 if pattern == "full" else stride, 0
    length = class_length(seq_length, stride)
    for launch in launches(pattern, seq_length, stride):
        tile = forward_tile(launch, length, torch.bfloat16, 64)
        by_residue = launch.far == "residues"
        step = stride if by_residue else 1
        starts = range(0, length * stride, tile.queries * stride) if by_residue else range(0, seq_length, tile.queries)
        for first in (start + residue for start in starts for residue in range(step)):
            if first < seq_length:
                last = min(first + (tile.queries - 1) * step, seq_length - 1)
                total += tile.queries * _scores_per_query(launch, tile, first, last, stride, offset)
    return total


def _scores_per_query(launch: Launch, tile: Tile, first: int, last: int, stride: int, offset: int) -> int:
    """Scores of each row of a tile of queries from `first` to `last`."""
    scores = 0
    if launch.near == "window":
        scores += _up(last + 1 - max(0, first - stride + 1), tile.keys)
    elif launch.near == "block":
        scores += _up(last + 1 - max(0, (first + offset) // stride * stride - offset), tile.keys)
    if launch.far == "summaries":
        scores += _up((last + offset) // stride, tile.keys)
    elif launch.far == "rows":
        multiples = max(0, last - offset + stride) // stride
        scores += _up(multiples - launch.beyond, tile.chunk)
    elif launch.far == "residues":
        base, limit = (first + stride - offset) % stride, last - stride * launch.beyond
        scores += _up((limit - base + stride) // stride, tile.keys)
    if offset and not launch.beyond and launch.far in ("rows", "residues"):
        scores += 1
    return scores


def _up(count: int, size: int) -> int:
    """The multiple of `size` from `count` on."""
    return max(0, -(-count // size)) * size
