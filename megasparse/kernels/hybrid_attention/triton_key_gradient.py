"""The Triton kernel of hybrid sparse attention for the gradients of keys and values.

A program has a tile of keys and meets the queries that see them: parts and names are those of `triton_kernels.py`, the
way to the gradient that of `triton_query_gradient.py`. No program adds to what another one writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention.triton_parts import (
    count_before,
    ends_of,
    first_token,
    limits,
    load_rows,
    load_rows_of_each,
    of_head,
    of_own_head,
    of_row,
    offset_of,
    place,
    query_range,
    starts_of,
    store_rows,
)


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
    stride_q_sample,
    stride_q_head,
    stride_q_token,
    stride_k_sample,
    stride_k_head,
    stride_k_token,
    stride_v_sample,
    stride_v_head,
    stride_v_token,
    stride_dout_sample,
    stride_dout_head,
    stride_dout_token,
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
    tile, sample, row = place(num_tiles, num_rows)
    head = row * HEADS
    gathered, first, step = key_tile(tile, offset_of(offsets_pointer, head), seq_length, stride, FAR, KEYS)
    if first >= seq_length:
        return
    positions = first + tl.arange(0, KEYS) * step
    valid = positions < seq_length
    last = tl.minimum(first + (KEYS - 1) * step, seq_length - 1)
    until = ends_of(ends_pointer, sample, last, seq_length)
    factor = scale * 1.4426950408889634
    k_rows = of_head(k_pointer, sample, head // share, stride_k_sample, stride_k_head)
    v_rows = of_head(v_pointer, sample, head // share, stride_v_sample, stride_v_head)
    k = load_rows(k_rows, positions, stride_k_token, valid, HEAD_DIM, WIDTH)
    v = load_rows(v_rows, positions, stride_v_token, valid, HEAD_DIM, WIDTH)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)
    pointers = q_pointer, dout_pointer, lse_pointer, delta_pointer
    strides = stride_q_sample, stride_q_head, stride_dout_sample, stride_dout_head
    steps = stride_q_token, stride_dout_token
    if FAR == "rows" or (FAR == "residues" and not BEYOND and offsets_pointer is not None):
        for member in range(0, HEADS):
            offset = offset_of(offsets_pointer, head + member)
            rows = rows_of_queries(*pointers, sample, head + member, seq_length, num_heads, *strides)
            if offsets_pointer is not None and not BEYOND:
                itself = valid & (offset > 0)
                dk, dv = add_gradients_of_itself(
                    k, v, dk, dv, *rows, *steps, positions, itself, factor, HEAD_DIM, WIDTH
                )
            if FAR == "rows":
                ends = ends_of(ends_pointer, sample, positions, seq_length)
                begin, end = 1 if BEYOND else 0, count_before(until, first + offset, stride)
                bounds = positions, valid, ends, begin, end, stride, offset, factor
                dk, dv = add_gradients_of_rows(k, v, dk, dv, *rows, *steps, *bounds, CHUNK, HEAD_DIM, WIDTH)
    if NEAR != "none" or FAR == "residues":
        PART: tl.constexpr = "residues" if FAR == "residues" else NEAR
        for member in range(0, HEADS):
            offset = offset_of(offsets_pointer, head + member)
            rows = rows_of_queries(*pointers, sample, head + member, seq_length, num_heads, *strides)
            bounds = positions, first, last, until, gathered, starts_pointer, sample, seq_length, stride, offset, factor
            dk, dv = add_gradients_of_tiles(
                k, v, dk, dv, *rows, *steps, *bounds, PART, BEYOND, QUERIES, HEAD_DIM, WIDTH, PRECISION
            )
    if FAR == "summaries":
        valid = valid & (gathered | ((positions + offset_of(offsets_pointer, head)) % stride != stride - 1))
    own = positions, valid, sample, row, seq_length, num_rows
    add_previous_and_store(dk_pointer, previous_dk_pointer, dk * scale, *own, HEAD_DIM, WIDTH)
    add_previous_and_store(dv_pointer, previous_dv_pointer, dv, *own, HEAD_DIM, WIDTH)


@triton.jit
def key_tile(tile, offset, seq_length, stride, FAR: tl.constexpr, KEYS: tl.constexpr):
    """Whether the keys of a tile are gathered last keys of blocks; its first key, and the step to the next."""
    gathered = tile < 0
    if FAR == "summaries":
        summary_tiles = tl.cdiv(tl.cdiv(seq_length, stride), KEYS)
        gathered = tile < summary_tiles
        first = tl.where(gathered, stride - 1 - offset + tile * KEYS * stride, (tile - summary_tiles) * KEYS)
        step = tl.where(gathered, stride, 1)
    else:
        first, step = first_token(tile, seq_length, stride, FAR == "residues", KEYS)
    return gathered, first, step


@triton.jit
def add_previous_and_store(
    pointer,
    previous_pointer,
    sums,
    positions,
    valid,
    sample,
    row,
    seq_length,
    num_rows,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    if previous_pointer is not None:
        previous = of_own_head(previous_pointer, sample, row, seq_length, num_rows, HEAD_DIM)
        sums += load_rows(previous, positions, num_rows * HEAD_DIM, valid, HEAD_DIM, WIDTH)
    rows = of_own_head(pointer, sample, row, seq_length, num_rows, HEAD_DIM)
    store_rows(rows, positions, num_rows * HEAD_DIM, valid, sums, HEAD_DIM, WIDTH)


@triton.jit
def rows_of_queries(
    q_pointer,
    dout_pointer,
    lse_pointer,
    delta_pointer,
    sample,
    head,
    seq_length,
    num_heads,
    stride_q_sample,
    stride_q_head,
    stride_dout_sample,
    stride_dout_head,
):
    """Of one query head: queries, output gradients, log-sum-exp and delta."""
    return (
        of_head(q_pointer, sample, head, stride_q_sample, stride_q_head),
        of_head(dout_pointer, sample, head, stride_dout_sample, stride_dout_head),
        of_row(lse_pointer, sample, head, seq_length, num_heads),
        of_row(delta_pointer, sample, head, seq_length, num_heads),
    )


@triton.jit
def add_gradients_of_itself(
    k,
    v,
    dk,
    dv,
    q_rows,
    dout_rows,
    lse_rows,
    delta_rows,
    stride_q_token,
    stride_dout_token,
    positions,
    itself,
    factor,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dK / scale and dV plus those of each key's own query, where `itself`."""
    q = load_rows(q_rows, positions, stride_q_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
    dout = load_rows(dout_rows, positions, stride_dout_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
    lse = tl.load(lse_rows + positions, mask=itself, other=0.0)
    delta = tl.load(delta_rows + positions, mask=itself, other=0.0)
    weights = tl.where(itself, tl.exp2(tl.sum(q * k.to(tl.float32), 1) * factor - lse), 0.0)
    dscores = weights * (tl.sum(dout * v.to(tl.float32), 1) - delta)
    return dk + dscores[:, None] * q, dv + weights[:, None] * dout


@triton.jit
def add_gradients_of_rows(
    k,
    v,
    dk,
    dv,
    q_rows,
    dout_rows,
    lse_rows,
    delta_rows,
    stride_q_token,
    stride_dout_token,
    positions,
    valid,
    ends,
    begin,
    end,
    stride,
    offset,
    factor,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dK / scale and dV plus those of the queries at `begin` to `end` multiples of the stride after each key."""
    keys, values = k.to(tl.float32), v.to(tl.float32)
    for chunk in range(begin, end, CHUNK):
        queries = positions[:, None] + offset + (chunk + tl.arange(0, CHUNK))[None, :] * stride
        active = (queries < ends[:, None]) & valid[:, None]
        q_KCD = load_rows_of_each(q_rows, queries, stride_q_token, active, HEAD_DIM, WIDTH)
        dout_KCD = load_rows_of_each(dout_rows, queries, stride_dout_token, active, HEAD_DIM, WIDTH)
        lse = tl.load(lse_rows + queries, mask=active, other=0.0)
        delta = tl.load(delta_rows + queries, mask=active, other=0.0)
        scores = tl.sum(keys[:, None, :] * q_KCD, 2) * factor
        weights = tl.where(active, tl.exp2(scores - lse), 0.0)
        dv += tl.sum(weights[:, :, None] * dout_KCD, 1)
        dscores = weights * (tl.sum(values[:, None, :] * dout_KCD, 2) - delta)
        dk += tl.sum(dscores[:, :, None] * q_KCD, 1)
    return dk, dv


@triton.jit
def add_gradients_of_tiles(
    k,
    v,
    dk,
    dv,
    q_rows,
    dout_rows,
    lse_rows,
    delta_rows,
    stride_q_token,
    stride_dout_token,
    positions,
    first,
    last,
    until,
    gathered,
    starts_pointer,
    sample,
    seq_length,
    stride,
    offset,
    factor,
    PART: tl.constexpr,
    BEYOND: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK / scale and dV plus those of the tiles of one part."""
    base, step, begin, end = query_range(first, last, until, gathered, stride, offset, PART, BEYOND)
    for index in range(begin, end, QUERIES):
        places = index + tl.arange(0, QUERIES)
        queries = base + places * step
        inside = places < end
        q = load_rows(q_rows, queries, stride_q_token, inside, HEAD_DIM, WIDTH)
        dout = load_rows(dout_rows, queries, stride_dout_token, inside, HEAD_DIM, WIDTH)
        lse = tl.load(lse_rows + queries, mask=inside, other=0.0)
        delta = tl.load(delta_rows + queries, mask=inside, other=0.0)
        starts = starts_of(starts_pointer, sample, queries, seq_length)
        low, high = limits(queries, starts, stride, offset, PART, BEYOND)
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
