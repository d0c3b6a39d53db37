"""Triton kernels of hybrid sparse attention, forward, and what the backward kernels (`triton_gradients.py`) share with
it. ``gpu`` launches them and is the only importer, as Triton may be missing.

A program has a tile of queries: consecutive ones, or, where FAR is "residues", those of one position modulo the stride.
It meets the keys of up to two parts of the pattern, under one running maximum and sum:

    NEAR  window      the query and the stride - 1 keys before it
          block       the keys of the query's block up to the query
          none
    FAR   residues    keys at `offset` + multiples of the stride before the query: tiles of their own residue
          rows        the same keys, each query with its own, as dot products row by row
          summaries   the last keys of the blocks before the query's block, gathered
          none

BEYOND: of the keys at multiples of the stride only those outside of the window. Tiles are masked by two positions per
query, its first and its last key (``limits``): every part is an interval of some sequence of keys. Documents raise the
first key to the first token of the query's own document (`starts`).

Scores are in units of log2: exp2 is what the hardware has. All sums are made in float32 and in a fixed order.
Triton wants capitals for compile-time constants. Integer division rounds towards zero there: operands are kept at zero
or above.

Tensor names: Q queries of a tile, K keys of a tile, D head dimension padded to WIDTH, C keys of a row at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


# Lengths and strides change in mid-run (validation, generation, a schedule): kept out of Triton's specialization for
# multiples of 16, they compile nothing anew.
@triton.jit(do_not_specialize=["seq_length", "stride", "num_tiles", "num_heads", "share"])
def forward_kernel(
    q_pointer,  # [B, H, T, D] by the strides given, unit stride along D
    k_pointer,  # [B, G, T, D], as v
    v_pointer,
    out_pointer,  # [B, T, H, D], contiguous
    previous_pointer,  # what an earlier launch made of other parts, as `out` but float32; None
    lse_pointer,  # [B, H, T], float32: with `previous` that of the earlier launch
    starts_pointer,  # [B, T], first token of each token's document; None
    offsets_pointer,  # [H]; None: zeros
    seq_length,
    stride,
    num_tiles,  # of queries
    num_heads,
    share,  # query heads that share a key-value head
    scale,
    stride_q_sample,
    stride_q_head,
    stride_q_token,
    stride_k_sample,
    stride_k_head,
    stride_k_token,
    stride_v_sample,
    stride_v_head,
    stride_v_token,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BEYOND: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and log-sum-exp of the parts, joined to those of an earlier launch. A query without a key gets 0, -inf."""
    tile, sample, head = place(num_tiles, num_heads)
    first, step = first_token(tile, seq_length, stride, FAR == "residues", QUERIES)
    if first >= seq_length:
        return
    offset = offset_of(offsets_pointer, head)
    positions = first + tl.arange(0, QUERIES) * step
    valid = positions < seq_length
    starts = starts_of(starts_pointer, sample, positions, seq_length)
    factor = scale * 1.4426950408889634
    q_rows = of_head(q_pointer, sample, head, stride_q_sample, stride_q_head)
    k_rows = of_head(k_pointer, sample, head // share, stride_k_sample, stride_k_head)
    v_rows = of_head(v_pointer, sample, head // share, stride_v_sample, stride_v_head)
    q = load_rows(q_rows, positions, stride_q_token, valid, HEAD_DIM, WIDTH)

    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    if offsets_pointer is not None and not BEYOND and (FAR == "rows" or FAR == "residues"):
        # With an offset no multiple of the stride leads to the query itself.
        itself = valid & (offset > 0)
        k = load_rows(k_rows, positions, stride_k_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
        top = tl.where(itself, tl.sum(q.to(tl.float32) * k, 1) * factor, float("-inf"))
        total = itself.to(tl.float32)
        sums = load_rows(v_rows, positions, stride_v_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
    if FAR == "rows":
        queries = q.to(tl.float32)
        begin, end = row_range(first, starts_pointer, sample, seq_length, stride, offset, BEYOND, QUERIES)
        for chunk in range(begin, end, CHUNK):
            keys = positions[:, None] - offset - (chunk + tl.arange(0, CHUNK))[None, :] * stride
            live = (keys >= starts[:, None]) & valid[:, None]
            k_QCD = load_rows_of_each(k_rows, keys, stride_k_token, live, HEAD_DIM, WIDTH)
            v_QCD = load_rows_of_each(v_rows, keys, stride_v_token, live, HEAD_DIM, WIDTH)
            scores = tl.where(live, tl.sum(queries[:, None, :] * k_QCD, 2) * factor, float("-inf"))
            top, total, shrink, weights = raise_top(top, total, scores)
            sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * v_QCD, 1)
    if FAR == "summaries" or FAR == "residues":
        top, total, sums = attend_tiles(
            *(q, k_rows, v_rows, stride_k_token, stride_v_token, top, total, sums, positions, first, starts),
            *(starts_pointer, sample, seq_length, stride, offset, factor),
            *(FAR, BEYOND, QUERIES, KEYS, HEAD_DIM, WIDTH, PRECISION),
        )
    if NEAR != "none":
        top, total, sums = attend_tiles(
            *(q, k_rows, v_rows, stride_k_token, stride_v_token, top, total, sums, positions, first, starts),
            *(starts_pointer, sample, seq_length, stride, offset, factor),
            *(NEAR, BEYOND, QUERIES, KEYS, HEAD_DIM, WIDTH, PRECISION),
        )

    lse_rows = of_row(lse_pointer, sample, head, seq_length, num_heads) + positions
    if previous_pointer is not None:
        previous_rows = of_own_head(previous_pointer, sample, head, seq_length, num_heads, HEAD_DIM)
        previous = load_rows(previous_rows, positions, num_heads * HEAD_DIM, valid, HEAD_DIM, WIDTH)
        scores = tl.load(lse_rows, mask=valid, other=float("-inf"))
        top, total, shrink, weights = raise_top(top, total, scores[:, None])
        sums = sums * shrink[:, None] + previous * tl.sum(weights, 1)[:, None]
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out_rows = of_own_head(out_pointer, sample, head, seq_length, num_heads, HEAD_DIM)
    store_rows(out_rows, positions, num_heads * HEAD_DIM, valid, sums / total[:, None], HEAD_DIM, WIDTH)
    tl.store(lse_rows, tl.where(seen, top + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def attend_tiles(
    q,
    k_rows,
    v_rows,
    stride_k_token,
    stride_v_token,
    top,
    total,
    sums,
    positions,
    first,
    starts,
    starts_pointer,
    sample,
    seq_length,
    stride,
    offset,
    factor,
    PART: tl.constexpr,
    BEYOND: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Join the keys of one part to the running maximum, sum and weighted values."""
    low, high = limits(positions, starts, stride, offset, PART, BEYOND)
    base, step, begin, end = key_range(first, starts_pointer, sample, seq_length, stride, offset, PART, BEYOND, QUERIES)
    for index in range(begin, end, KEYS):
        places = index + tl.arange(0, KEYS)
        keys = base + places * step
        inside = places < end
        k = load_rows(k_rows, keys, stride_k_token, inside, HEAD_DIM, WIDTH)
        v = load_rows(v_rows, keys, stride_v_token, inside, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        live = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None])
        top, total, shrink, weights = raise_top(top, total, tl.where(live, scores, float("-inf")))
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
    return top, total, sums


@triton.jit
def raise_top(top, total, scores):
    """One step of the softmax over further scores: maximum, sum, the factor of what was summed before, and weights."""
    raised = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key yet: -inf minus -inf would be NaN.
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    return raised, total * shrink + tl.sum(weights, 1), shrink, weights


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
