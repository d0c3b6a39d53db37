"""The Triton kernel of hybrid sparse attention for the gradient of the queries.

Parts, tiles and names are those of `triton_kernels.py`. The probabilities are made again from the joined log-sum-exp:
each part then gives its final share. p = exp(s - lse), ds = p (dp - delta), delta = sum(dO O).
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention import triton_parts as parts


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
    strides_q,
    strides_k,
    strides_v,
    strides_dout,
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
    pointers = starts_pointer, offsets_pointer
    tile, scope, head = parts.query_tile(pointers, num_tiles, num_heads, seq_length, stride, FAR, QUERIES)
    first, positions, valid, _ = tile
    _, sample, _, _, offset = scope
    if first >= seq_length:
        return
    own = sample, head, seq_length, num_heads
    DIMS: tl.constexpr = (HEAD_DIM, WIDTH)
    factor = scale * 1.4426950408889634
    q_rows = parts.of_head(q_pointer, sample, head, strides_q)
    k_rows = parts.of_head(k_pointer, sample, head // share, strides_k)
    v_rows = parts.of_head(v_pointer, sample, head // share, strides_v)
    q = parts.load_rows(q_rows, positions, valid, DIMS)
    dout = parts.load_rows(parts.of_head(dout_pointer, sample, head, strides_dout), positions, valid, DIMS)
    lse = tl.load(parts.of_row(lse_pointer, *own) + positions, mask=valid, other=0.0)
    delta_rows = parts.of_row(delta_pointer, *own) + positions
    if previous_pointer is None:
        out = parts.load_rows(parts.of_own_head(out_pointer, *own, DIMS), positions, valid, DIMS)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
        tl.store(delta_rows, delta, mask=valid)
    else:
        delta = tl.load(delta_rows, mask=valid, other=0.0)

    dq = tl.zeros((QUERIES, WIDTH), tl.float32)
    if offsets_pointer is not None and not BEYOND and (FAR == "rows" or FAR == "residues"):
        itself = valid & (offset > 0)
        k = parts.load_wide_rows(k_rows, positions, itself, DIMS)
        v = parts.load_wide_rows(v_rows, positions, itself, DIMS)
        weights = tl.where(itself, tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * factor - lse), 0.0)
        dq = (weights * (tl.sum(dout.to(tl.float32) * v, 1) - delta))[:, None] * k
    given = q, dout, lse, delta, (k_rows, v_rows), tile, scope, factor
    if FAR == "rows":
        dq = add_rows(*given, dq, BEYOND, QUERIES, CHUNK, DIMS)
    if FAR == "summaries" or FAR == "residues":
        dq = add_tiles(*given, dq, FAR, BEYOND, QUERIES, KEYS, DIMS, PRECISION)
    if NEAR != "none":
        dq = add_tiles(*given, dq, NEAR, BEYOND, QUERIES, KEYS, DIMS, PRECISION)
    parts.store_gradient(dq_pointer, previous_pointer, dq * scale, positions, valid, own, DIMS)


@triton.jit
def add_rows(q, dout, lse, delta, rows, tile, scope, factor, dq, BEYOND, QUERIES, CHUNK, DIMS):
    """dQ / scale plus that of the keys at multiples of the stride before each query, row by row."""
    begin, end = parts.row_range(tile[0], scope, BEYOND, QUERIES)
    queries, douts = q.to(tl.float32), dout.to(tl.float32)
    for chunk in range(begin, end, CHUNK):
        k_QCD, v_QCD, scores, active = parts.score_rows(queries, rows, chunk, tile, scope, factor, CHUNK, DIMS)
        weights = tl.where(active, tl.exp2(scores - lse[:, None]), 0.0)
        dscores = weights * (tl.sum(douts[:, None, :] * v_QCD, 2) - delta[:, None])
        dq += tl.sum(dscores[:, :, None] * k_QCD, 1)
    return dq


@triton.jit
def add_tiles(q, dout, lse, delta, rows, tile, scope, factor, dq, PART, BEYOND, QUERIES, KEYS, DIMS, PRECISION):
    """dQ / scale plus that of the tiles of one part."""
    begin, end, span = parts.key_range(tile, scope, PART, BEYOND, QUERIES)
    for index in range(begin, end, KEYS):
        k, v, scores, active = parts.score_keys(q, rows, index, span, factor, KEYS, DIMS, PRECISION)
        weights = tl.where(active, tl.exp2(scores - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq
