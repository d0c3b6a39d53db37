"""What the Triton kernels of hybrid sparse attention share: which keys and queries meet, and how rows are loaded.

Every part of a pattern (`triton_kernels.py`) is an interval of a sequence of keys, base + i step, for each query:
``limits`` tells its first and last key, ``key_range`` the indices i that a tile of queries meets.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def limits(queries, starts, stride, offset, PART: tl.constexpr, BEYOND: tl.constexpr):
    """The first and the last key that a query sees, among the keys of PART. Both grow with the query."""
    if PART == "window":
        low, high = tl.maximum(queries - stride + 1, starts), queries
    elif PART == "block":
        low, high = tl.maximum((queries + offset) // stride * stride - offset, starts), queries
    elif PART == "summaries":
        low, high = starts, (queries + offset) // stride * stride - offset - 1
    elif BEYOND:
        low, high = starts, queries - stride
    else:
        low, high = starts, queries
    return low, high


@triton.jit
def key_range(
    first,
    starts_pointer,
    sample,
    seq_length,
    stride,
    offset,
    PART: tl.constexpr,
    BEYOND: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Keys of PART for a tile of queries from `first` on: those at base + i step, begin <= i < end."""
    if PART == "residues":
        last = tl.minimum(first + (QUERIES - 1) * stride, seq_length - 1)
        base, step = (first + stride - offset) % stride, stride
    else:
        last = tl.minimum(first + QUERIES - 1, seq_length - 1)
        base, step = 0, 1
        if PART == "summaries":
            base, step = stride - 1 - offset, stride
    low, _ = limits(first, starts_of(starts_pointer, sample, first, seq_length), stride, offset, PART, BEYOND)
    _, high = limits(last, last * 0, stride, offset, PART, BEYOND)
    return base, step, count_before(low, base, step), count_before(high + 1, base, step)


@triton.jit
def query_range(first, last, until, gathered, stride, offset, PART: tl.constexpr, BEYOND: tl.constexpr):
    """Queries that may see a tile of keys, from key `first` to key `last`: base + i step, begin <= i < end.

    `until`: one more than the last token of the document of `last`.
    """
    base, step, nearest = 0, 1, first
    if PART == "window":
        until = tl.minimum(until, last + stride)
    elif PART == "block":
        until = tl.where(gathered, until, tl.minimum(until, (last + offset) // stride * stride - offset + stride))
    else:
        base, step = (first + offset) % stride, stride
        if BEYOND:
            nearest = first + stride
    return base, step, count_before(nearest, base, step), count_before(until, base, step)


@triton.jit
def row_range(first, starts_pointer, sample, seq_length, stride, offset, BEYOND: tl.constexpr, QUERIES: tl.constexpr):
    """Multiples of the stride back to the earliest key of the row part, for consecutive queries from `first` on."""
    last = tl.minimum(first + QUERIES - 1, seq_length - 1)
    low = starts_of(starts_pointer, sample, first, seq_length)
    return 1 if BEYOND else 0, count_before(last + 1, low + offset, stride)


@triton.jit
def count_before(limit, base, step):
    """How many of base, base + step, base + 2 step, ... are below `limit`."""
    return tl.maximum(limit - base + step - 1, 0) // step


@triton.jit
def place(num_tiles, num_heads):
    """Tile, sample and head of a program. Tiles of one head follow each other, to share its keys in the L2 cache."""
    row = tl.program_id(0) // num_tiles
    return tl.program_id(0) % num_tiles, row // num_heads, row % num_heads


@triton.jit
def first_token(tile, seq_length, stride, BY_RESIDUE: tl.constexpr, SIZE: tl.constexpr):
    """First token of a tile of SIZE, and the step to the next. A residue may have no token for its last tile."""
    if BY_RESIDUE:
        tiles = tl.cdiv(tl.cdiv(seq_length, stride), SIZE)
        first, step = tile // tiles + tile % tiles * SIZE * stride, stride
    else:
        first, step = tile * SIZE, 1
    return first, step


@triton.jit
def offset_of(offsets_pointer, head):
    if offsets_pointer is not None:
        offset = tl.load(offsets_pointer + head)
    else:
        offset = head * 0
    return offset


@triton.jit
def starts_of(starts_pointer, sample, positions, seq_length):
    """First token of the document of each position; of one position, or of many."""
    if starts_pointer is not None:
        rows = starts_pointer + sample.to(tl.int64) * seq_length + positions
        starts = tl.load(rows, mask=positions < seq_length, other=0)
    else:
        starts = positions * 0
    return starts


@triton.jit
def ends_of(ends_pointer, sample, positions, seq_length):
    """One more than the last token of the document of each position; of one position, or of many."""
    if ends_pointer is not None:
        rows = ends_pointer + sample.to(tl.int64) * seq_length + positions
        ends = tl.load(rows, mask=positions < seq_length, other=0)
    else:
        ends = positions * 0 + seq_length
    return ends


@triton.jit
def of_head(pointer, sample, head, stride_sample, stride_head):
    return pointer + sample.to(tl.int64) * stride_sample + head.to(tl.int64) * stride_head


@triton.jit
def of_own_head(pointer, sample, head, seq_length, num_heads, HEAD_DIM: tl.constexpr):
    """Of a contiguous [B, T, H, D]; the step to the next token is num_heads x HEAD_DIM."""
    return pointer + (sample.to(tl.int64) * seq_length * num_heads + head) * HEAD_DIM


@triton.jit
def of_row(pointer, sample, head, seq_length, num_heads):
    """Of a contiguous [B, H, T]."""
    return pointer + (sample.to(tl.int64) * num_heads + head) * seq_length


@triton.jit
def load_rows(rows, positions, stride_token, valid, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[positions, WIDTH], zero where not `valid` and beyond the head dimension."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if HEAD_DIM != WIDTH:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(rows + positions.to(tl.int64)[:, None] * stride_token + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows_of_each(rows, positions, stride_token, valid, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """[*positions, WIDTH] for positions in two dimensions, in float32."""
    columns = tl.arange(0, WIDTH)
    mask = valid[:, :, None]
    if HEAD_DIM != WIDTH:
        mask = mask & (columns < HEAD_DIM)[None, None, :]
    tile = rows + positions.to(tl.int64)[:, :, None] * stride_token + columns[None, None, :]
    return tl.load(tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(rows, positions, stride_token, valid, values, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    columns = tl.arange(0, WIDTH)
    mask = valid[:, None]
    if HEAD_DIM != WIDTH:
        mask = mask & (columns < HEAD_DIM)[None, :]
    tile = rows + positions.to(tl.int64)[:, None] * stride_token + columns[None, :]
    tl.store(tile, values.to(rows.dtype.element_ty), mask=mask)
