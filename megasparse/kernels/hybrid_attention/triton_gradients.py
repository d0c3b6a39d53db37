"""Triton kernels of hybrid sparse attention, backward: the gradient of the queries, and that of keys and values.

Parts, tiles and names are those of `triton_kernels.py`. Both kernels make the probabilities again from the joined
log-sum-exp, so that each part gives its final share: p = exp2(s - lse), ds = p (dp - delta), delta = sum(dO O). No
program adds to what another one writes: sums have a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention.triton_kernels import (
    count_before,
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
        queries, douts = q.to(tl.float32), dout.to(tl.float32)
        begin, end = row_range(first, starts_pointer, sample, seq_length, stride, offset, BEYOND, QUERIES)
        for chunk in range(begin, end, CHUNK):
            keys = positions[:, None] - offset - (chunk + tl.arange(0, CHUNK))[None, :] * stride
            live = (keys >= starts[:, None]) & valid[:, None]
            k_QCD = load_rows_of_each(k_rows, keys, stride_k_token, live, HEAD_DIM, WIDTH)
            v_QCD = load_rows_of_each(v_rows, keys, stride_v_token, live, HEAD_DIM, WIDTH)
            scores = tl.sum(queries[:, None, :] * k_QCD, 2) * factor
            weights = tl.where(live, tl.exp2(scores - lse[:, None]), 0.0)
            dscores = weights * (tl.sum(douts[:, None, :] * v_QCD, 2) - delta[:, None])
            dq += tl.sum(dscores[:, :, None] * k_QCD, 1)
    if FAR == "summaries" or FAR == "residues":
        dq = add_query_gradient(
            *(q, dout, k_rows, v_rows, stride_k_token, stride_v_token, dq, lse, delta, positions, first, starts),
            *(starts_pointer, sample, seq_length, stride, offset, factor),
            *(FAR, BEYOND, QUERIES, KEYS, HEAD_DIM, WIDTH, PRECISION),
        )
    if NEAR != "none":
        dq = add_query_gradient(
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
def add_query_gradient(
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
        live = (keys[None, :] >= low[:, None]) & (keys[None, :] <= high[:, None])
        weights = tl.where(live, tl.exp2(scores - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


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
    gathered = tile < 0
    if FAR == "summaries":
        offset = offset_of(offsets_pointer, head)
        summary_tiles = tl.cdiv(tl.cdiv(seq_length, stride), KEYS)
        gathered = tile < summary_tiles
        first = tl.where(gathered, stride - 1 - offset + tile * KEYS * stride, (tile - summary_tiles) * KEYS)
        step = tl.where(gathered, stride, 1)
    else:
        first, step = first_token(tile, seq_length, stride, FAR == "residues", KEYS)
    if first >= seq_length:
        return
    positions = first + tl.arange(0, KEYS) * step
    valid = positions < seq_length
    last = tl.minimum(first + (KEYS - 1) * step, seq_length - 1)
    ends = ends_of(ends_pointer, sample, positions, seq_length)
    until = ends_of(ends_pointer, sample, last, seq_length)
    factor = scale * 1.4426950408889634
    k_rows = of_head(k_pointer, sample, head // share, stride_k_sample, stride_k_head)
    v_rows = of_head(v_pointer, sample, head // share, stride_v_sample, stride_v_head)
    k = load_rows(k_rows, positions, stride_k_token, valid, HEAD_DIM, WIDTH)
    v = load_rows(v_rows, positions, stride_v_token, valid, HEAD_DIM, WIDTH)
    dk = tl.zeros((KEYS, WIDTH), tl.float32)
    dv = tl.zeros((KEYS, WIDTH), tl.float32)

    if FAR == "rows" or (FAR == "residues" and not BEYOND and offsets_pointer is not None):
        keys, values = k.to(tl.float32), v.to(tl.float32)
        for member in range(0, HEADS):
            offset = offset_of(offsets_pointer, head + member)
            q_rows = of_head(q_pointer, sample, head + member, stride_q_sample, stride_q_head)
            dout_rows = of_head(dout_pointer, sample, head + member, stride_dout_sample, stride_dout_head)
            lse_rows = of_row(lse_pointer, sample, head + member, seq_length, num_heads)
            delta_rows = of_row(delta_pointer, sample, head + member, seq_length, num_heads)
            if offsets_pointer is not None and not BEYOND:
                itself = valid & (offset > 0)
                q = load_rows(q_rows, positions, stride_q_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
                dout = load_rows(dout_rows, positions, stride_dout_token, itself, HEAD_DIM, WIDTH).to(tl.float32)
                lse = tl.load(lse_rows + positions, mask=itself, other=0.0)
                delta = tl.load(delta_rows + positions, mask=itself, other=0.0)
                weights = tl.where(itself, tl.exp2(tl.sum(q * keys, 1) * factor - lse), 0.0)
                dv += weights[:, None] * dout
                dk += (weights * (tl.sum(dout * values, 1) - delta))[:, None] * q
            if FAR == "rows":
                for chunk in range(1 if BEYOND else 0, count_before(until, first + offset, stride), CHUNK):
                    queries = positions[:, None] + offset + (chunk + tl.arange(0, CHUNK))[None, :] * stride
                    live = (queries < ends[:, None]) & valid[:, None]
                    q_KCD = load_rows_of_each(q_rows, queries, stride_q_token, live, HEAD_DIM, WIDTH)
                    dout_KCD = load_rows_of_each(dout_rows, queries, stride_dout_token, live, HEAD_DIM, WIDTH)
                    lse = tl.load(lse_rows + queries, mask=live, other=0.0)
                    delta = tl.load(delta_rows + queries, mask=live, other=0.0)
                    scores = tl.sum(keys[:, None, :] * q_KCD, 2) * factor
                    weights = tl.where(live, tl.exp2(scores - lse), 0.0)
                    dv += tl.sum(weights[:, :, None] * dout_KCD, 1)
                    dscores = weights * (tl.sum(values[:, None, :] * dout_KCD, 2) - delta)
                    dk += tl.sum(dscores[:, :, None] * q_KCD, 1)
    if NEAR != "none" or FAR == "residues":
        PART: tl.constexpr = "residues" if FAR == "residues" else NEAR
        for member in range(0, HEADS):
            offset = offset_of(offsets_pointer, head + member)
            q_rows = of_head(q_pointer, sample, head + member, stride_q_sample, stride_q_head)
            dout_rows = of_head(dout_pointer, sample, head + member, stride_dout_sample, stride_dout_head)
            lse_rows = of_row(lse_pointer, sample, head + member, seq_length, num_heads)
            delta_rows = of_row(delta_pointer, sample, head + member, seq_length, num_heads)
            base, query_step, begin, end = query_range(
                first, last, until, gathered, seq_length, stride, offset, PART, BEYOND
            )
            for index in range(begin, end, QUERIES):
                places = index + tl.arange(0, QUERIES)
                queries = base + places * query_step
                inside = places < end
                q = load_rows(q_rows, queries, stride_q_token, inside, HEAD_DIM, WIDTH)
                dout = load_rows(dout_rows, queries, stride_dout_token, inside, HEAD_DIM, WIDTH)
                lse = tl.load(lse_rows + queries, mask=inside, other=0.0)
                delta = tl.load(delta_rows + queries, mask=inside, other=0.0)
                starts = starts_of(starts_pointer, sample, queries, seq_length)
                low, high = limits(queries, starts, stride, offset, PART, BEYOND)
                if FAR == "summaries":
                    low = tl.where(gathered, starts, low)
                live = (positions[:, None] >= low[None, :]) & (positions[:, None] <= high[None, :]) & inside[None, :]
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor
                weights = tl.where(live, tl.exp2(scores - lse[None, :]), 0.0)
                dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
                dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
                dscores = weights * (dweights - delta[None, :])
                dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)

    dk *= scale
    if previous_dk_pointer is not None:
        previous_dk = of_own_head(previous_dk_pointer, sample, row, seq_length, num_rows, HEAD_DIM)
        previous_dv = of_own_head(previous_dv_pointer, sample, row, seq_length, num_rows, HEAD_DIM)
        dk += load_rows(previous_dk, positions, num_rows * HEAD_DIM, valid, HEAD_DIM, WIDTH)
        dv += load_rows(previous_dv, positions, num_rows * HEAD_DIM, valid, HEAD_DIM, WIDTH)
    if FAR == "summaries":
        valid = valid & (gathered | ((positions + offset_of(offsets_pointer, head)) % stride != stride - 1))
    dk_rows = of_own_head(dk_pointer, sample, row, seq_length, num_rows, HEAD_DIM)
    dv_rows = of_own_head(dv_pointer, sample, row, seq_length, num_rows, HEAD_DIM)
    store_rows(dk_rows, positions, num_rows * HEAD_DIM, valid, dk, HEAD_DIM, WIDTH)
    store_rows(dv_rows, positions, num_rows * HEAD_DIM, valid, dv, HEAD_DIM, WIDTH)


@triton.jit
def query_range(first, last, until, gathered, seq_length, stride, offset, PART: tl.constexpr, BEYOND: tl.constexpr):
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
def ends_of(ends_pointer, sample, positions, seq_length):
    """One more than the last token of the document of each position; of one position, or of many."""
    if ends_pointer is not None:
        rows = ends_pointer + sample.to(tl.int64) * seq_length + positions
        ends = tl.load(rows, mask=positions < seq_length, other=0)
    else:
        ends = positions * 0 + seq_length
    return ends
