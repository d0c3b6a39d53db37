"""Triton kernels of the sparse linear layer: a product over the active blocks of each output group, and the weight
gradient of active blocks. ``gpu`` launches them and is the only importer, as Triton may be missing. Weights are stored
dense or PACKED; where a block lies is told as in ``storage.Places``.

All sums are made in float32 and in a fixed order (no atomics), so that equal inputs give equal bits. Tile sizes are
explained in ``tiles``. Triton wants capitals for compile-time constants: UNIT is the side of the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megasparse.kernels.block_sparse.triton_activations import store_activated


# Numbers that change from step to step are kept out of Triton's specialization for multiples of 16, which would compile
# the kernel anew in the middle of a run.
@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def product_kernel(
    a_pointer,  # [num_tokens, inner width], unit stride along the width
    weight_pointer,  # only active blocks are read
    bias_pointer,  # [outer width]; anything where HAS_BIAS is False
    c_pointer,  # [num_tokens, outer width]
    z_pointer,  # as c: the input of the activation; None where there is no activation
    offsets_pointer,  # [num_groups + 1], into `indices`
    indices_pointer,  # inner block of each active block, by outer group
    places_pointer,  # the same where the storage is dense, the slot of each active block where it is PACKED
    order_pointer,  # [num_groups], groups with most active blocks first
    num_tokens,
    num_groups,
    stride_a,
    stride_inner,  # of the weight along the summed width
    stride_outer,  # of the weight along the width of the result
    stride_group,  # from the blocks of an outer group to those of the next one
    stride_place,
    stride_c,
    PACKED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    SWAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # its name, where there is one
    BACKWARDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """c = a B^T + bias, where B is the weight (y = x W^T + b) or its transpose (dx = dy W).

    With an activation f the sums become z, which is written, and c = f(z); or where BACKWARDS z is read, and c is the
    sums times f'(z).

    A program computes ROWS tokens x COLUMNS features of one group of UNIT features; where SWAPPED as c^T = B a^T, so
    that its tokens are the long side of the tensor cores.
    """
    PARTS: tl.constexpr = UNIT // COLUMNS
    tile, slot = _place(tl.program_id(0), tl.cdiv(num_tokens, ROWS), num_groups * PARTS, GROUP)
    group = tl.load(order_pointer + slot // PARTS)
    first = tl.load(offsets_pointer + group)
    last = tl.load(offsets_pointer + group + 1)
    tokens = tile * ROWS + tl.arange(0, ROWS)
    within = (slot % PARTS) * COLUMNS + tl.arange(0, COLUMNS)
    outer = group * UNIT + within
    # Rows past the last token repeat others and are never stored: that costs less than a mask in the loop.
    a_rows = a_pointer + (tokens % num_tokens).to(tl.int64)[:, None] * stride_a
    weight_columns = weight_pointer + group.to(tl.int64) * stride_group + within.to(tl.int64)[None, :] * stride_outer
    depth = tl.arange(0, DEPTH)
    sums = tl.zeros((COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS), dtype=tl.float32)
    # The block of the next step is loaded in this one. Were it loaded where it is used, Triton's pipeliner would count
    # the loads behind it as a second level, and would leave them a single buffer (seen in the compiled code).
    if DEPTH <= UNIT:
        STEPS: tl.constexpr = UNIT // DEPTH
        a_tile = a_rows + depth[None, :]
        weight_tile = weight_columns + depth[:, None] * stride_inner
        block = tl.load(indices_pointer + first, mask=first < last, other=0)
        stored = tl.load(places_pointer + first, mask=first < last, other=0) if PACKED else block
        for step in range(0, (last - first) * STEPS):
            part = (step % STEPS) * DEPTH
            a = tl.load(a_tile + block.to(tl.int64) * UNIT + part)
            weight = tl.load(weight_tile + stored.to(tl.int64) * stride_place + part * stride_inner)
            place = first + (step + 1) // STEPS
            block = tl.load(indices_pointer + place, mask=place < last, other=0)
            stored = tl.load(places_pointer + place, mask=place < last, other=0) if PACKED else block
            sums = _add_product(a, weight, sums, SWAPPED, PRECISION)
    else:
        # Small blocks: several in one step, so that tensor cores have enough to do between two loads.
        BLOCKS: tl.constexpr = DEPTH // UNIT
        place = first + depth // UNIT
        block = tl.load(indices_pointer + place, mask=place < last, other=0)
        stored = tl.load(places_pointer + place, mask=place < last, other=0) if PACKED else block
        weight_rows = weight_columns + (depth % UNIT).to(tl.int64)[:, None] * stride_inner
        for _ in range(0, tl.cdiv(last - first, BLOCKS)):
            active = place < last
            inner = _runs(block * UNIT + depth % UNIT, UNIT)
            a = tl.load(a_rows + inner[None, :], mask=active[None, :], other=0.0)
            weight_tile = weight_rows + stored.to(tl.int64)[:, None] * stride_place
            weight = tl.load(weight_tile, mask=active[:, None], other=0.0)
            place += BLOCKS
            block = tl.load(indices_pointer + place, mask=place < last, other=0)
            stored = tl.load(places_pointer + place, mask=place < last, other=0) if PACKED else block
            sums = _add_product(a, weight, sums, SWAPPED, PRECISION)
    if SWAPPED:
        sums = tl.trans(sums)
    if HAS_BIAS:
        sums += tl.load(bias_pointer + outer).to(tl.float32)[None, :]
    if z_pointer is None:
        c_tile = c_pointer + tokens.to(tl.int64)[:, None] * stride_c + outer[None, :]
        tl.store(c_tile, sums.to(c_pointer.dtype.element_ty), mask=(tokens < num_tokens)[:, None])
    else:
        rows, column = tokens.to(tl.int64)[:, None] * stride_c, group * UNIT + (slot % PARTS) * COLUMNS
        store_activated(
            sums, c_pointer, z_pointer, rows + column, (tokens < num_tokens)[:, None], ACTIVATION, BACKWARDS
        )


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_split", "num_rows", "num_active"])
def gradient_kernel(
    dy_pointer,  # [num_tokens, R * UNIT], unit stride along the width
    x_pointer,  # [num_tokens, C * UNIT], unit stride along the width
    out_pointer,  # dW as it is stored, or sums [splits, num_active, UNIT, UNIT] in float32 where PARTIAL
    offsets_pointer,  # [R + 1], into `columns`
    columns_pointer,  # [num_active]
    rows_pointer,  # [num_active]
    places_pointer,  # [num_active], as in ``product_kernel``
    num_tokens,
    tokens_per_split,
    num_rows,  # R
    num_active,
    stride_dy,
    stride_x,
    stride_out,
    stride_group,
    stride_place,
    PACKED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    MAX_ROWS: tl.constexpr,  # a power of two, at least R
    PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW = dy^T x on active blocks, over the tokens of one split.

    A program computes ROWS x COLUMNS of one block, or of several consecutive active blocks of a block row where COLUMNS
    exceeds UNIT. The tile is held transposed: its many columns then feed the long side of the tensor cores.
    """
    BLOCKS: tl.constexpr = COLUMNS // UNIT if COLUMNS > UNIT else 1
    COLUMN_PARTS: tl.constexpr = 1 if COLUMNS > UNIT else UNIT // COLUMNS
    PARTS: tl.constexpr = (UNIT // ROWS) * COLUMN_PARTS
    chunk = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    if BLOCKS == 1:
        row, first, last = tl.load(rows_pointer + chunk), chunk, chunk + 1
    else:
        row, first, last = _chunk(chunk, offsets_pointer, num_rows, BLOCKS, MAX_ROWS)
        # The host launches as many programs as there could be chunks; it does not know how many there are.
        if row >= num_rows:
            return
    i = (part // COLUMN_PARTS) * ROWS + tl.arange(0, ROWS)
    j = (part % COLUMN_PARTS) * COLUMNS + tl.arange(0, COLUMNS)
    place = first + j // UNIT
    active = place < last
    block = tl.load(columns_pointer + place, mask=active, other=0)
    inner = _runs(block * UNIT + j % UNIT, UNIT if COLUMNS > UNIT else COLUMNS)
    start = tl.program_id(1) * tokens_per_split
    end = tl.minimum(start + tokens_per_split, num_tokens)
    step = tl.arange(0, DEPTH)
    x_rows = x_pointer + start.to(tl.int64) * stride_x
    dy_rows = dy_pointer + start.to(tl.int64) * stride_dy
    x_tile = step[None, :] * stride_x + inner[:, None]
    dy_tile = step[:, None] * stride_dy + (row * UNIT + i)[None, :]
    sums = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    # Whole steps need no mask: columns beyond the last active block repeat another block's, and are not stored.
    for _ in range(0, (end - start) // DEPTH):
        x = tl.load(x_rows + x_tile)
        dy = tl.load(dy_rows + dy_tile)
        x_rows += DEPTH * stride_x
        dy_rows += DEPTH * stride_dy
        sums = tl.dot(x, dy, sums, input_precision=PRECISION)
    left = (end - start) % DEPTH
    if left > 0:
        # Both sides are masked: zero times an infinity of a token beyond the end would not be zero.
        x = tl.load(x_rows + x_tile, mask=(step < left)[None, :], other=0.0)
        dy = tl.load(dy_rows + dy_tile, mask=(step < left)[:, None], other=0.0)
        sums = tl.dot(x, dy, sums, input_precision=PRECISION)
    if PARTIAL:
        base = out_pointer + (tl.program_id(1).to(tl.int64) * num_active + first) * (UNIT * UNIT)
        out = base + (j // UNIT * (UNIT * UNIT) + j % UNIT)[:, None] + i[None, :] * UNIT
    else:
        stored = tl.load(places_pointer + place, mask=active, other=0) if PACKED else block
        columns = _runs(stored.to(tl.int64) * stride_place + j % UNIT, UNIT if COLUMNS > UNIT else COLUMNS)
        out = out_pointer + row.to(tl.int64) * stride_group + i.to(tl.int64)[None, :] * stride_out + columns[:, None]
    tl.store(out, sums.to(out_pointer.dtype.element_ty), mask=active[:, None])


@triton.jit(do_not_specialize=["splits"])
def sum_kernel(
    partial_pointer,  # [splits, num_active, UNIT, UNIT], float32
    dweight_pointer,
    places_pointer,  # [num_active], as in ``product_kernel``
    rows_pointer,
    splits,
    stride_split,
    stride_dweight,
    stride_group,
    stride_place,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The active blocks of dW from their sums over each split of the tokens: ROWS rows of one block per program."""
    PARTS: tl.constexpr = UNIT // ROWS
    place = tl.program_id(0) // PARTS
    i = (tl.program_id(0) % PARTS) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, UNIT)
    part = partial_pointer + place.to(tl.int64) * (UNIT * UNIT) + i[:, None] * UNIT + j[None, :]
    sums = tl.zeros((ROWS, UNIT), dtype=tl.float32)
    for _ in range(0, splits):
        sums += tl.load(part)
        part += stride_split
    row, stored = tl.load(rows_pointer + place).to(tl.int64), tl.load(places_pointer + place).to(tl.int64)
    block = dweight_pointer + row * stride_group + stored * stride_place
    out = block + i.to(tl.int64)[:, None] * stride_dweight + j[None, :]
    tl.store(out, sums.to(dweight_pointer.dtype.element_ty))


@triton.jit
def _add_product(a, weight, sums, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a weight, or its transpose: operands in shared memory are turned for nothing."""
    if SWAPPED:
        sums = tl.dot(tl.trans(weight), tl.trans(a), sums, input_precision=PRECISION)
    else:
        sums = tl.dot(a, weight, sums, input_precision=PRECISION)
    return sums


@triton.jit
def _place(program, num_tiles, num_slots, GROUP: tl.constexpr):
    """Token tile and output slot of a program.

    All slots of GROUP token tiles come one after the other, so that these tokens stay in the L2 cache; within them the
    slots with most active blocks come first, so that the last programs to start are short ones.
    """
    first = program // (GROUP * num_slots) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * num_slots)
    return first + within % size, within // size


@triton.jit
def _chunk(chunk, offsets_pointer, num_rows, BLOCKS: tl.constexpr, MAX_ROWS: tl.constexpr):
    """Block row, first active block and end of the block row of chunk `chunk`, where every block row is cut into chunks
    of BLOCKS active blocks; a row that does not exist where there are fewer chunks."""
    rows = tl.arange(0, MAX_ROWS)
    starts = tl.load(offsets_pointer + rows, mask=rows < num_rows, other=0)
    ends = tl.load(offsets_pointer + rows + 1, mask=rows < num_rows, other=0)
    chunks = (ends - starts + BLOCKS - 1) // BLOCKS
    through = tl.cumsum(chunks, 0)
    before = through <= chunk
    row = tl.sum(before.to(tl.int32), 0)
    within = chunk - tl.sum(tl.where(before, chunks, 0), 0)
    safe = tl.minimum(row, num_rows - 1)
    return row, tl.load(offsets_pointer + safe) + within * BLOCKS, tl.load(offsets_pointer + safe + 1)


@triton.jit
def _runs(indices, LENGTH: tl.constexpr):
    """Tell the compiler that `indices` are aligned runs of LENGTH: loads through them are then wide."""
    return tl.max_contiguous(tl.multiple_of(indices, LENGTH), LENGTH)
