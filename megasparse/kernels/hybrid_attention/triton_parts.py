"""What the Triton kernels of hybrid sparse attention share: which keys and queries meet, and how rows are loaded.

Every part of a pattern (`triton_kernels.py`) is an interval of a sequence of keys, base + i step, for each query:
``limits`` tells its first and last key, ``key_range`` the indices i that a tile of queries meets.

Capitals are compile-time constants. Triton asks for the annotation in kernels only; in functions that kernels call it
keeps what it was given. Values that go together travel as tuples:

    rows    address of the first token of one head, and the step to the next token
    DIMS    HEAD_DIM, WIDTH
    tile    first query, all queries, which of them are tokens of the sequence, first token of the document of each
    scope   starts_pointer, sample, seq_length, stride, offset: what bounds the keys of a tile of queries
    span    base, step and end of the keys of one part, and the first and the last of them that each query sees
    own     sample, head, seq_length, num_heads: where the results of a head lie
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def limits(queries, starts, stride, offset, PART, BEYOND):
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
def query_tile(pointers, num_tiles, num_heads, seq_length, stride, FAR, QUERIES):
    """Tile, scope and head of a program that has a tile of queries. pointers: to the starts and the offsets."""
    starts_pointer, offsets_pointer = pointers
    number, sample, head = place(num_tiles, num_heads)
    first, step = first_token(number, seq_length, stride, FAR == "residues", QUERIES)
    positions = first + tl.arange(0, QUERIES) * step
    starts = bounds_of(starts_pointer, sample, positions, seq_length, 0)
    scope = starts_pointer, sample, seq_length, stride, offset_of(offsets_pointer, head)
    return (first, positions, positions < seq_length, starts), scope, head


@triton.jit
def key_range(tile, scope, PART, BEYOND, QUERIES):
    """Keys of PART for a tile of queries: those at base + i step, begin <= i < end. Returns begin, end and the span."""
    first, positions, valid, starts = tile
    starts_pointer, sample, seq_length, stride, offset = scope
    if PART == "residues":
        last = tl.minimum(first + (QUERIES - 1) * stride, seq_length - 1)
        base, step = (first + stride - offset) % stride, stride
    else:
        last = tl.minimum(first + QUERIES - 1, seq_length - 1)
        base, step = 0, 1
        if PART == "summaries":
            base, step = stride - 1 - offset, stride
    low, _ = limits(first, bounds_of(starts_pointer, sample, first, seq_length, 0), stride, offset, PART, BEYOND)
    _, high = limits(last, last * 0, stride, offset, PART, BEYOND)
    begin, end = count_before(low, base, step), count_before(high + 1, base, step)
    low, high = limits(positions, starts, stride, offset, PART, BEYOND)
    return begin, end, (base, step, end, low, high)


@triton.jit
def whole_tiles(tile, scope, begin, end, span, PART, BEYOND, KEYS):
    """Tiles of KEYS from `begin` to `end`: from which to which one every query sees every key of them."""
    first, positions, valid, starts = tile
    starts_pointer, sample, seq_length, stride, offset = scope
    base, step = span[0], span[1]
    # Both limits grow with the query.
    last = tl.max(tl.where(valid, positions, 0), 0)
    low, _ = limits(last, bounds_of(starts_pointer, sample, last, seq_length, 0), stride, offset, PART, BEYOND)
    _, high = limits(first, first * 0, stride, offset, PART, BEYOND)
    front = tl.cdiv(tl.maximum(count_before(low, base, step) - begin, 0), KEYS)
    back = tl.maximum(count_before(high + 1, base, step) - begin, 0) // KEYS
    front = tl.minimum(front, tl.cdiv(tl.maximum(end - begin, 0), KEYS))
    return front, tl.maximum(front, back)


@triton.jit
def score_keys(q, rows, index, span, KEYS, DIMS, PRECISION, WHOLE):
    """KEYS keys from number `index` of a span on: keys, values, positions, and products of queries and keys. WHOLE:
    none of them lies beyond the span."""
    k_rows, v_rows = rows
    base, step, end = span[0], span[1], span[2]
    places = index + tl.arange(0, KEYS)
    positions = base + places * step
    inside = positions >= 0 if WHOLE else places < end
    k = load_rows(k_rows, positions, inside, DIMS)
    v = load_rows(v_rows, positions, inside, DIMS)
    return k, v, positions, tl.dot(q, tl.trans(k), input_precision=PRECISION)


@triton.jit
def seen(positions, span):
    """Which keys of a tile each query sees."""
    return (positions[None, :] >= span[3][:, None]) & (positions[None, :] <= span[4][:, None])


@triton.jit
def score_rows(queries, rows, chunk, tile, scope, factor, CHUNK, DIMS):
    """Each query's own keys at `chunk` and further multiples of the stride before it: as ``score_keys``."""
    first, positions, valid, starts = tile
    starts_pointer, sample, seq_length, stride, offset = scope
    k_rows, v_rows = rows
    keys = positions[:, None] - offset - (chunk + tl.arange(0, CHUNK))[None, :] * stride
    active = (keys >= starts[:, None]) & valid[:, None]
    k_QCD, v_QCD = load_wide_rows(k_rows, keys, active, DIMS), load_wide_rows(v_rows, keys, active, DIMS)
    return k_QCD, v_QCD, tl.sum(queries[:, None, :] * k_QCD, 2) * factor, active


@triton.jit
def query_range(first, last, until, gathered, stride, offset, PART, BEYOND):
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
def row_range(first, scope, BEYOND, QUERIES):
    """Multiples of the stride back to the earliest key of the row part, for consecutive queries from `first` on."""
    starts_pointer, sample, seq_length, stride, offset = scope
    last = tl.minimum(first + QUERIES - 1, seq_length - 1)
    low = bounds_of(starts_pointer, sample, first, seq_length, 0)
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
def first_token(tile, seq_length, stride, BY_RESIDUE, SIZE):
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
def bounds_of(pointer, sample, positions, seq_length, otherwise):
    """First token, or one more than the last, of the document of each position (one, or many), by `pointer` [B, T].

    otherwise: what the sequence has, where there are no documents.
    """
    if pointer is not None:
        rows = pointer + sample.to(tl.int64) * seq_length + positions
        bounds = tl.load(rows, mask=positions < seq_length, other=0)
    else:
        bounds = positions * 0 + otherwise
    return bounds


@triton.jit
def of_head(pointer, sample, head, strides):
    """Rows of a head by the strides of samples, heads and tokens."""
    return pointer + sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1], strides[2]


@triton.jit
def of_own_head(pointer, sample, head, seq_length, num_heads, DIMS):
    """Rows of a head of a contiguous [B, T, H, D]."""
    return pointer + (sample.to(tl.int64) * seq_length * num_heads + head) * DIMS[0], num_heads * DIMS[0]


@triton.jit
def of_row(pointer, sample, head, seq_length, num_heads):
    """Of a contiguous [B, H, T]."""
    return pointer + (sample.to(tl.int64) * num_heads + head) * seq_length


@triton.jit
def addresses(rows, positions, valid, DIMS):
    """Of [*positions, WIDTH], and the mask: not `valid`, and beyond the head dimension."""
    first, step = rows
    HEAD_DIM: tl.constexpr = DIMS[0]
    WIDTH: tl.constexpr = DIMS[1]
    columns = tl.arange(0, WIDTH)
    mask = tl.expand_dims(valid, -1)
    if HEAD_DIM != WIDTH:
        mask = mask & (columns < HEAD_DIM)
    return first + tl.expand_dims(positions.to(tl.int64), -1) * step + columns, mask


@triton.jit
def load_rows(rows, positions, valid, DIMS):
    """[*positions, WIDTH], zero where not `valid` and beyond the head dimension."""
    places, mask = addresses(rows, positions, valid, DIMS)
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def load_wide_rows(rows, positions, valid, DIMS):
    return load_rows(rows, positions, valid, DIMS).to(tl.float32)


@triton.jit
def store_rows(rows, positions, valid, values, DIMS):
    places, mask = addresses(rows, positions, valid, DIMS)
    tl.store(places, values.to(rows[0].dtype.element_ty), mask=mask)


@triton.jit
def store_gradient(pointer, previous_pointer, sums, positions, valid, own, DIMS):
    """`sums` plus those of an earlier launch."""
    if previous_pointer is not None:
        sums += load_rows(of_own_head(previous_pointer, *own, DIMS), positions, valid, DIMS)
    store_rows(of_own_head(pointer, *own, DIMS), positions, valid, sums, DIMS)
