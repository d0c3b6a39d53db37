"""Triton kernels of what lies between the products: each goes through its tensors once, in float32 arithmetic. ``gpu``
launches them and is the only importer, as Triton may be missing; what they compute is in ``reference``.

Triton wants capitals for compile-time constants. WIDTH is a power of two, at least the width of a row. No atomics:
equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_kernel(x_pointer, y_pointer, width, COLUMNS: tl.constexpr):
    """y = silu(g) u of the halves g and u of each row of x [rows, 2 width]: COLUMNS of a row in each program."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    x_row = x_pointer + row * 2 * width + columns
    gate = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_row + width, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_pointer + row * width + columns, y.to(y_pointer.dtype.element_ty), mask=inside)


@triton.jit
def gate_gradient_kernel(dy_pointer, x_pointer, dx_pointer, width, COLUMNS: tl.constexpr):
    """dx [rows, 2 width] of ``gate_kernel``."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    x_row, dx_row = x_pointer + row * 2 * width + columns, dx_pointer + row * 2 * width + columns
    gate = tl.load(x_row, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_row + width, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    dgate = dy * up * share * (1 + gate * (1 - share))
    tl.store(dx_row, dgate.to(dx_pointer.dtype.element_ty), mask=inside)
    tl.store(dx_row + width, (dy * gate * share).to(dx_pointer.dtype.element_ty), mask=inside)


# Generation comes with one token more each time: nothing shall be compiled anew for multiples of 16.
@triton.jit(do_not_specialize=["num_rows", "seq_length"])
def rotate_kernel(
    x_pointer,  # [B, H, T, 2 HALF] by the strides given, unit stride along the last
    cos_pointer,  # [T, HALF], float32, as sin
    sin_pointer,
    y_pointer,  # [B, T, H, 2 HALF], contiguous
    num_rows,  # B T H
    seq_length,
    num_heads,
    strides,  # of samples, heads and tokens
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """Turn the pairs (i, i + HALF) of ROWS rows by the angles of their tokens, or back again."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    token = rows // num_heads % seq_length
    sample, head = rows // num_heads // seq_length, rows % num_heads
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    start = sample.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]
    x_tile = x_pointer + start[:, None] + columns[None, :]
    first = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_tile + HALF, mask=mask, other=0.0).to(tl.float32)
    angle = token[:, None] * HALF + columns[None, :]
    cos = tl.load(cos_pointer + angle, mask=mask, other=0.0)
    sin = tl.load(sin_pointer + angle, mask=mask, other=0.0)
    if BACKWARDS:
        sin = -sin
    y_tile = y_pointer + rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(y_tile, (first * cos - second * sin).to(y_pointer.dtype.element_ty), mask=mask)
    tl.store(y_tile + HALF, (second * cos + first * sin).to(y_pointer.dtype.element_ty), mask=mask)


@triton.jit
def normalize_kernel(
    x_pointer,  # [rows, width], contiguous, as all
    added_pointer,
    weight_pointer,  # [width]
    bias_pointer,  # None: no bias
    sum_pointer,
    y_pointer,
    moments_pointer,  # [rows, 2], float32: mean (0 unless CENTRED) and 1 / standard deviation
    width,
    epsilon,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """sum = x + added, and its normalisation y: one row in each program."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = columns < width
    x = tl.load(x_pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(added_pointer + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    # What is normalised is the sum as it is stored: the backward pass and the next layers see no other.
    rounded = x.to(sum_pointer.dtype.element_ty)
    tl.store(sum_pointer + row * width + columns, rounded, mask=inside)
    x = rounded.to(tl.float32)
    mean = 0.0
    if CENTRED:
        mean = tl.sum(x, 0) / width
        x = tl.where(inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + epsilon)
    y = x * scale * tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_pointer is not None:
        y += tl.load(bias_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_pointer + row * width + columns, y.to(y_pointer.dtype.element_ty), mask=inside)
    tl.store(moments_pointer + row * 2, mean)
    tl.store(moments_pointer + row * 2 + 1, scale)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def normalize_gradient_kernel(
    dy_pointer,  # of y
    dsum_pointer,  # of the sum by what else uses it
    sum_pointer,
    weight_pointer,
    moments_pointer,
    dx_pointer,  # of x, and of what was added
    dweight_pointer,  # [programs, width], float32, as dbias: sums over the rows of each program
    dbias_pointer,  # None: no bias
    num_rows,
    rows_each,
    width,
    CENTRED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """With z = (sum - mean) scale: dx = dsum + scale (dz - mean(dz) - z mean(dz z)), of dz = dy weight."""
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    first = tl.program_id(0) * rows_each
    place, moments = first.to(tl.int64) * width + columns, moments_pointer + first.to(tl.int64) * 2
    for _ in range(first, tl.minimum(first + rows_each, num_rows)):
        dy = tl.load(dy_pointer + place, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(sum_pointer + place, mask=inside, other=0.0).to(tl.float32)
        dx = tl.load(dsum_pointer + place, mask=inside, other=0.0).to(tl.float32)
        mean, scale = tl.load(moments), tl.load(moments + 1)
        z = tl.where(inside, (x - mean) * scale, 0.0)
        dz = dy * weight
        both = dz - z * (tl.sum(dz * z, 0) / width)
        if CENTRED:
            both -= tl.sum(dz, 0) / width
        dx += scale * both
        tl.store(dx_pointer + place, dx.to(dx_pointer.dtype.element_ty), mask=inside)
        dweight += dy * z
        dbias += dy
        place += width
        moments += 2
    own = tl.program_id(0).to(tl.int64) * width + columns
    tl.store(dweight_pointer + own, dweight, mask=inside)
    if dbias_pointer is not None:
        tl.store(dbias_pointer + own, dbias, mask=inside)
