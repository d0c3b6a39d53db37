"""The Triton kernel of hybrid sparse attention for the gradients of keys and values.

A program has a tile of keys and meets the queries that see them: parts, names and the way to the gradient are those of
`triton_kernels.py`. No program adds to what another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention import triton_parts as parts


@triton.jit(do_not_specialize=["seq_length", "stride", "num_tiles", "num_heads", "share"])
def key_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    dout_pointer,
    dk_pointer,  # [B, T, H / HEADS, D], contiguous, as dv
    dv_pointer,
    previous_dk_pointer,  # gradients by an earlier launch, float32; None
    previous_dv_pointer,
    lse_pointer,
    delta_pointer,
    starts_pointer,
    ends_pointer,  # [B, T], one more than the last token of each token's document; None
    offsets_pointer,
    seq_length,
    stride,
    num_tiles,
    num_heads,
    share,
    scale,
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    BEYOND: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of the parts, summed over HEADS query heads, plus those of an earlier launch.

    A program has a tile of keys. Under "summaries" the first programs have the gathered last keys of blocks, which all
    later queries see, and the others the keys between these: their heads have one offset.
    """
    num_rows = num_heads // HEADS
    tile, sample, row = parts.place(num_tiles, num_rows)
    head = row * HEADS
    gathered, first, step = key_tile(tile, parts.offset_of(offsets_pointer, head), seq_length, stride, FAR, KEYS)
    if first >= seq_length:
        return
    positions = first + tl.arange(0, KEYS) * step
    valid = positions < seq_length
    last = tl.minimum(first + (KEYS - 1) * step, seq_length - 1)
    until = parts.bounds_of(ends_pointer, sample, last, seq_length, seq_length)
    DIMS: tl.constexpr = (HEAD_DIM, WIDTH)
    factor = scale * 1.4426950408889634
    k_rows = parts.of_head(k_pointer, sample, head // share, strides_k)
    v_rows = parts.of_head(v_pointer, sample, head // share, strides_v)
    k = parts.load_rows(k_rows, positions, valid, DIMS)
    v = parts.load_rows(v_rows, positions, valid, DIMS)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    given = q_pointer, dout_pointer, lse_pointer, delta_pointer, strides_q, strides_dout, seq_length, num_heads
    if FAR == "rows" or (FAR == "residues" and not BEYOND and offsets_pointer is not None):
        for member in range(0, HEADS):
            offset = parts.offset_of(offsets_pointer, head + member)
            rows = rows_of_queries(given, sample, head + member)
            if offsets_pointer is not None and not BEYOND:
                itself = valid & (offset > 0)
                dk, dv = add_itself(k, v, dk, dv, rows, positions, itself, factor, DIMS)
            if FAR == "rows":
                ends = parts.bounds_of(ends_pointer, sample, positions, seq_length, seq_length)
                begin, end = 1 if BEYOND else 0, parts.count_before(until, first + offset, stride)
                bounds = valid, ends, begin, end, stride, offset
                dk, dv = add_rows(k, v, dk, dv, rows, positions, bounds, factor, CHUNK, DIMS)
    if NEAR != "none" or FAR == "residues":
        PART: tl.constexpr = "residues" if FAR == "residues" else NEAR
        for member in range(0, HEADS):
            offset = parts.offset_of(offsets_pointer, head + member)
            rows = rows_of_queries(given, sample, head + member)
            bounds = first, last, until, gathered
            scope = starts_pointer, sample, seq_length, stride, offset
            tiles = k, v, dk, dv, rows, positions, bounds, scope, factor
            dk, dv = add_tiles(*tiles, PART, BEYOND, QUERIES, DIMS, PRECISION)
    if FAR == "summaries":
        valid = valid & (gathered | ((positions + parts.offset_of(offsets_pointer, head)) % stride != stride - 1))
    own = sample, row, seq_length, num_rows
    parts.store_gradient(dk_pointer, previous_dk_pointer, dk * scale, positions, valid, own, DIMS)
    parts.store_gradient(dv_pointer, previous_dv_pointer, dv, positions, valid, own, DIMS)


@triton.jit
def key_tile(tile, offset, seq_length, stride, FAR, KEYS):
    """Whether the keys of a tile are gathered last keys of blocks; its first key, and the step to the next."""
    gathered = tile < 0
    if FAR == "summaries":
        summary_tiles = tl.cdiv(tl.cdiv(seq_length, stride), KEYS)
        gathered = tile < summary_tiles
        first = tl.where(gathered, stride - 1 - offset + tile * KEYS * stride, (tile - summary_tiles) * KEYS)
        step = tl.where(gathered, stride, 1)
    else:
        first, step = parts.first_token(tile, seq_length, stride, FAR == "residues", KEYS)
    return gathered, first, step


@triton.jit
def rows_of_queries(given, sample, head):
    """Of one query head: queries, output gradients, log-sum-exp and delta."""
    q_pointer, dout_pointer, lse_pointer, delta_pointer, strides_q, strides_dout, seq_length, num_heads = given
    return (
        parts.of_head(q_pointer, sample, head, strides_q),
        parts.of_head(dout_pointer, sample, head, strides_dout),
        parts.of_row(lse_pointer, sample, head, seq_length, num_heads),
        parts.of_row(delta_pointer, sample, head, seq_length, num_heads),
    )


@triton.jit
def load_queries(rows, queries, valid, load: tl.constexpr, DIMS):
    """Queries, output gradients, log-sum-exp and delta at `queries`, zero where not `valid`. load: as `load_rows`."""
    q = load(rows[0], queries, valid, DIMS)
    dout = load(rows[1], queries, valid, DIMS)
    lse = tl.load(rows[2] + queries, mask=valid, other=0.0)
    return q, dout, lse, tl.load(rows[3] + queries, mask=valid, other=0.0)


@triton.jit
def add_itself(k, v, dk, dv, rows, positions, itself, factor, DIMS):
    """dK / scale and dV plus those of each key's own query, where `itself`."""
    q, dout, lse, delta = load_queries(rows, positions, itself, parts.load_wide_rows, DIMS)
    weights = tl.where(itself, tl.exp2(tl.sum(q * k.to(tl.float32), 1) * factor - lse), 0.0)
    dscores = weights * (tl.sum(dout * v.to(tl.float32), 1) - delta)
    return dk + dscores[:, None] * q, dv + weights[:, None] * dout


@triton.jit
def add_rows(k, v, dk, dv, rows, positions, bounds, factor, CHUNK, DIMS):
    """dK / scale and dV plus those of the queries at `begin` to `end` multiples of the stride after each key."""
    valid, ends, begin, end, stride, offset = bounds
    keys, values = k.to(tl.float32), v.to(tl.float32)
    for chunk in range(begin, end, CHUNK):
        queries = positions[:, None] + offset + (chunk + tl.arange(0, CHUNK))[None, :] * stride
        active = (queries < ends[:, None]) & valid[:, None]
        q_KCD, dout_KCD, lse, delta = load_queries(rows, queries, active, parts.load_wide_rows, DIMS)
        scores = tl.sum(keys[:, None, :] * q_KCD, 2) * factor
        weights = tl.where(active, tl.exp2(scores - lse), 0.0)
        dv += tl.sum(weights[:, :, None] * dout_KCD, 1)
        dscores = weights * (tl.sum(values[:, None, :] * dout_KCD, 2) - delta)
        dk += tl.sum(dscores[:, :, None] * q_KCD, 1)
    return dk, dv


@triton.jit
def add_tiles(k, v, dk, dv, rows, positions, bounds, scope, factor, PART, BEYOND, QUERIES, DIMS, PRECISION):
    """dK / scale and dV plus those of the tiles of one part."""
    first, last, until, gathered = bounds
    starts_pointer, sample, seq_length, stride, offset = scope
    base, step, begin, end = parts.query_range(first, last, until, gathered, stride, offset, PART, BEYOND)
    for index in range(begin, end, QUERIES):
        places = index + tl.arange(0, QUERIES)
        queries = base + places * step
        inside = places < end
        q, dout, lse, delta = load_queries(rows, queries, inside, parts.load_rows, DIMS)
        starts = parts.bounds_of(starts_pointer, sample, queries, seq_length, 0)
        low, high = parts.limits(queries, starts, stride, offset, PART, BEYOND)
        if PART == "block":
            # All queries from the gathered last keys on see these: those of later blocks, and the key's own.
            low = tl.where(gathered, starts, low)
        active = (positions[:, None] >= low[None, :]) & (positions[:, None] <= high[None, :]) & inside[None, :]
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
        weights = tl.where(active, tl.exp2(scores - lse[None, :]), 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dscores = weights * (dweights - delta[None, :])
        dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv
