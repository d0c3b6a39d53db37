"""The Triton kernels of hybrid sparse attention that have a tile of queries: forward, and the queries' gradient.

``gpu`` launches them and the one for keys and values (`triton_key_gradient.py`), and is the only importer, as Triton
may be missing.

The queries of a tile are consecutive ones, or, where FAR is "residues", those of one position modulo the stride.
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

The backward pass makes the probabilities again from the joined log-sum-exp: each part then gives its final share.
p = exp(s - lse), ds = p (dp - delta), delta = sum(dO O).

Scores are in units of log2: exp2 is what the hardware has. All sums are made in float32 and in a fixed order.
Triton wants capitals for compile-time constants. Integer division rounds towards zero there: operands are kept at zero
or above.

Tensor names: Q queries of a tile, K keys of a tile, D head dimension padded to WIDTH, C keys of a row at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.hybrid_attention import triton_parts as parts


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
    strides_q,  # of samples, heads and tokens, as the others
    strides_k,
    strides_v,
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

    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    sums = tl.zeros((QUERIES, WIDTH), tl.float32)
    if offsets_pointer is not None and not BEYOND and (FAR == "rows" or FAR == "residues"):
        # With an offset no multiple of the stride leads to the query itself.
        itself = valid & (offset > 0)
        k = parts.load_wide_rows(k_rows, positions, itself, DIMS)
        top = tl.where(itself, tl.sum(q.to(tl.float32) * k, 1) * factor, float("-inf"))
        total = itself.to(tl.float32)
        sums = parts.load_wide_rows(v_rows, positions, itself, DIMS)
    given = q, (k_rows, v_rows), tile, scope, factor
    if FAR == "rows":
        top, total, sums = attend_rows(*given, top, total, sums, BEYOND, QUERIES, CHUNK, DIMS)
    if FAR == "summaries" or FAR == "residues":
        top, total, sums = attend_tiles(*given, top, total, sums, FAR, BEYOND, QUERIES, KEYS, DIMS, PRECISION)
    if NEAR != "none":
        top, total, sums = attend_tiles(*given, top, total, sums, NEAR, BEYOND, QUERIES, KEYS, DIMS, PRECISION)

    lse_rows = parts.of_row(lse_pointer, *own) + positions
    if previous_pointer is not None:
        previous = parts.load_rows(parts.of_own_head(previous_pointer, *own, DIMS), positions, valid, DIMS)
        scores = tl.load(lse_rows, mask=valid, other=float("-inf"))
        top, total, shrink, weights = raise_top(top, total, scores[:, None])
        sums = sums * shrink[:, None] + previous * tl.sum(weights, 1)[:, None]
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    out_rows = parts.of_own_head(out_pointer, *own, DIMS)
    parts.store_rows(out_rows, positions, valid, sums / total[:, None], DIMS)
    tl.store(lse_rows, tl.where(seen, top + tl.log2(total), float("-inf")), mask=valid)


@triton.jit
def attend_rows(q, rows, tile, scope, factor, top, total, sums, BEYOND, QUERIES, CHUNK, DIMS):
    """Join the keys at multiples of the stride before each query, row by row."""
    begin, end = parts.row_range(tile[0], scope, BEYOND, QUERIES)
    queries = q.to(tl.float32)
    for chunk in range(begin, end, CHUNK):
        _, v_QCD, scores, active = parts.score_rows(queries, rows, chunk, tile, scope, factor, CHUNK, DIMS)
        top, total, shrink, weights = raise_top(top, total, tl.where(active, scores, float("-inf")))
        sums = sums * shrink[:, None] + tl.sum(weights[:, :, None] * v_QCD, 1)
    return top, total, sums


@triton.jit
def attend_tiles(q, rows, tile, scope, factor, top, total, sums, PART, BEYOND, QUERIES, KEYS, DIMS, PRECISION):
    """Join the keys of one part to the running maximum, sum and weighted values."""
    begin, end, span = parts.key_range(tile, scope, PART, BEYOND, QUERIES)
    given = q, rows, span, factor
    if PART == "window" or PART == "block":
        for index in range(begin, end, KEYS):
            top, total, sums = attend_tile(*given, index, top, total, sums, KEYS, DIMS, PRECISION, False)
    else:
        # Far keys take many tiles. Those of them that all queries see whole come first, and need no mask.
        front, back = parts.whole_tiles(tile, scope, begin, end, span, PART, BEYOND, KEYS)
        for number in range(front, back):
            index = begin + number * KEYS
            top, total, sums = attend_tile(*given, index, top, total, sums, KEYS, DIMS, PRECISION, True)
        for number in range(0, tl.cdiv(tl.maximum(end - begin, 0), KEYS) - (back - front)):
            index = begin + tl.where(number < front, number, number + back - front) * KEYS
            top, total, sums = attend_tile(*given, index, top, total, sums, KEYS, DIMS, PRECISION, False)
    return top, total, sums


@triton.jit
def attend_tile(q, rows, span, factor, index, top, total, sums, KEYS, DIMS, PRECISION, WHOLE):
    """Join one tile of keys. The factor of the scores goes into the exponent, one multiplication and addition."""
    _, v, keys, products = parts.score_keys(q, rows, index, span, KEYS, DIMS, PRECISION, WHOLE)
    if not WHOLE:
        products = tl.where(parts.seen(keys, span), products, float("-inf"))
    raised = tl.maximum(top, tl.max(products, 1) * factor)
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(products * factor - finite[:, None])
    shrink = tl.exp2(top - finite)
    sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision=PRECISION)
    return raised, total * shrink + tl.sum(weights, 1), sums


@triton.jit
def raise_top(top, total, scores):
    """One step of the softmax over further scores: maximum, sum, the factor of what was summed before, and weights."""
    raised = tl.maximum(top, tl.max(scores, 1))
    # A query that has seen no key yet: -inf minus -inf would be NaN.
    finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite[:, None])
    shrink = tl.exp2(top - finite)
    return raised, total * shrink + tl.sum(weights, 1), shrink, weights


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
    given = q, dout, lse, delta, rows, span, factor
    if PART == "window" or PART == "block":
        for index in range(begin, end, KEYS):
            dq = add_tile(*given, index, dq, KEYS, DIMS, PRECISION, False)
    else:
        front, back = parts.whole_tiles(tile, scope, begin, end, span, PART, BEYOND, KEYS)
        for number in range(front, back):
            dq = add_tile(*given, begin + number * KEYS, dq, KEYS, DIMS, PRECISION, True)
        for number in range(0, tl.cdiv(tl.maximum(end - begin, 0), KEYS) - (back - front)):
            index = begin + tl.where(number < front, number, number + back - front) * KEYS
            dq = add_tile(*given, index, dq, KEYS, DIMS, PRECISION, False)
    return dq


@triton.jit
def add_tile(q, dout, lse, delta, rows, span, factor, index, dq, KEYS, DIMS, PRECISION, WHOLE):
    """dQ / scale plus that of one tile of keys."""
    k, v, keys, products = parts.score_keys(q, rows, index, span, KEYS, DIMS, PRECISION, WHOLE)
    weights = tl.exp2(products * factor - lse[:, None])
    if not WHOLE:
        weights = tl.where(parts.seen(keys, span), weights, 0.0)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)
