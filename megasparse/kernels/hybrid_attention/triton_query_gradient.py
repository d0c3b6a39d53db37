"""The Triton kernel of hybrid sparse attention for the gradient of the queries.

Parts, tiles and names are those of `triton_kernels.py`. The probabilities are made again from the joined log-sum-exp:
each part then gives its final share. p = exp(s - lse), ds = p (dp - delta), delta = sum(dO O).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention.triton_parts import (
    first_token,
    key_range,
    limits,
    load_rows,
    load_rows_of_each,
    of_head,
    of_own_head,
    of_row,
    offset_of,
    place,
    row_range,
    starts_of,
    store_rows,
)


@triton.jit(do_not_specialize=["seq_length", "stride", "num_tiles", "num_heads", "share"])
def query_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,  # [B, T, H, D], contiguous, as dq
    dout_pointer,  # [B, H, T, D] by the strides given, as q
    dq_pointer,
    previous_pointer,  # gradient by an earlier launch, float32; None
    lse_pointer,  # [B, H, T], as delta
    delta_pointer,  # written, except where `previous` is given
    starts_pointer,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of the parts, plus that of an earlier launch; and delta."""
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
    dout_rows = of_head(dout_pointer, sample, head, stride_dout_sample, stride_dout_head)
    q = load_rows(q_rows, positions, stride_q_token, valid, HEAD_DIM, WIDTH)
    dout = load_rows(dout_rows, positions, stride_dout_token, valid, HEAD_DIM, WIDTH)
    lse = tl.load(of_row(lse_pointer, sample, head, seq_length, num_heads) + positions, mask=valid, other=0.0)
    delta_rows = of_row(delta_pointer, sample, head, seq_length, num_heads) + positions
    if previous_pointer is None:
        out_rows = of_own_head(out_pointer, sample, head, seq_length, num_heads, HEAD_DIM)
        out = load_rows(out_rows, positions, num_heads * HEAD_DIM, valid, HEAD_DIM, WIDTH)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta_rows, delta, mask=valid)
    else:
        delta = tl.load(delta_rows, mask=valid, other=0.0)

    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    if offsets_pointer is not None and not BEYOND and (FAR == "rows" or FAR == "residues"):
        itself = valid & (offset > 0)
        k = load_rows(k_rows, positions, stride_k_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
        v = load_rows(v_rows, positions, stride_v_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
        weights = tl.where(itself, tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * factor - lse), 0.0)
        dq = (weights * (tl.sum(dout.to(tl.float32) * v, 1) - delta))[:, None] * k
    if FAR == "rows":
        begin, end = row_range(first, starts_pointer, sample, seq_length, stride, offset, BEYOND, QUERIES)
        dq = add_query_gradient_of_rows(
            *(q, dout, k_rows, v_rows, stride_k_token, stride_v_token, dq, lse, delta, positions, valid, starts),
            *(begin, end, stride, offset, factor, CHUNK, HEAD_DIM, WIDTH),
        )
    if FAR == "summaries" or FAR == "residues":
        dq = add_query_gradient_of_tiles(
            *(q, dout, k_rows, v_rows, stride_k_token, stride_v_token, dq, lse, delta, positions, first, starts),
            *(starts_pointer, sample, seq_length, stride, offset, factor),
            *(FAR, BEYOND, QUERIES, KEYS, HEAD_DIM, WIDTH, PRECISION),
        )
    if NEAR != "none":
        dq = add_query_gradient_of_tiles(
            *(q, dout, k_rows, v_rows, stride_k_token, stride_v_token, dq, lse, delta, positions, first, starts),
            *(starts_pointer, sample, seq_length, stride, offset, factor),
            *(NEAR, BEYOND, QUERIES, KEYS, HEAD_DIM, WIDTH, PRECISION),
        )

    dq *= scale
    if previous_pointer is not None:
        previous_rows = of_own_head(previous_pointer, sample, head, seq_length, num_heads, HEAD_DIM)
        dq += load_rows(previous_rows, positions, num_heads * HEAD_DIM, valid, HEAD_DIM, WIDTH)
    dq_rows = of_own_head(dq_pointer, sample, head, seq_length, num_heads, HEAD_DIM)
    store_rows(dq_rows, positions, num_heads * HEAD_DIM, valid, dq, HEAD_DIM, WIDTH)


@triton.jit
def add_query_gradient_of_rows(
    q,
    dout,
    k_rows,
    v_rows,
    stride_k_token,
    stride_v_token,
    dq,
    lse,
    delta,
    positions,
    valid,
    starts,
    begin,
    end,
    stride,
    offset,
    factor,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dQ / scale plus that of the keys at `begin` to `end` multiples of the stride before each query."""
    queries, douts = q.to(tl.float32), dout.to(tl.float32)
    for chunk in range(begin, end, CHUNK):
        keys = positions[:, None] - offset - (chunk + tl.arange(0, CHUNK))[None, :] * stride
        active = (keys >= starts[:, None]) & valid[:, None]
        k_QCD = load_rows_of_each(k_rows, keys, stride_k_token, active, HEAD_DIM, WIDTH)
        v_QCD = load_rows_of_each(v_rows, keys, stride_v_token, active, HEAD_DIM, WIDTH)
        scores = tl.sum(queries[:, None, :] * k_QCD, 2) * factor
        weights = tl.where(active, tl.exp2(scores - lse[:, None]), 0.0)
        dscores = weights * (tl.sum(douts[:, None, :] * v_QCD, 2) - delta[:, None])
        dq += tl.sum(dscores[:, :, None] * k_QCD, 1)
    return dq


@triton.jit
def add_query_gradient_of_tiles(
    q,
    dout,
    k_rows,
    v_rows,
    stride_k_token,
    stride_v_token,
    dq,
    lse,
    delta,
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
    """dQ / scale plus that of the tiles of one part."""
    low, high = limits(positions, starts, stride, offset, PART, BEYOND)
    base, step, begin, end = key_range(first, starts_pointer, sample, seq_length, stride, offset, PART, BEYOND, QUERIES)
    for index in range(begin, end, KEYS):
        places = index + tl.arange(0, KEYS)
        keys = base + places * step
        inside = places < end
        k = load_rows(k_rows, keys, stride_k_token, inside, HEAD_DIM, WIDTH)
        v = load_rows(v_rows, keys, stride_v_token, inside, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        active = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None])
        weights = tl.where(active, tl.exp2(scores - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq
