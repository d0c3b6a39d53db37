"""The end of a product of ``triton_kernels`` behind which (forward) or before which (input gradient) an activation
stands, one of ``activated.NAMES``. All arithmetic is in float32.

The exact GELU is not among them: its derivative behind an input gradient takes 255 registers of each thread on sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_activated(
    sums,  # [ROWS, COLUMNS], float32
    c_pointer,
    z_pointer,
    rows,  # [ROWS, 1]: offset of the first column in c and z
    inside,  # [ROWS, 1]: the row is stored
    ACTIVATION: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """z = sums and c = f(z), or where BACKWARDS c = sums times f'(z), of z that is read.

    One half of the columns after the other: with all at once the program takes up to 36 registers of a thread more than
    the product, and fewer programs are at work on a processor.
    """
    HALF: tl.constexpr = sums.shape[1] // 2
    left, right = tl.split(tl.permute(tl.reshape(sums, (sums.shape[0], 2, HALF)), (0, 2, 1)))
    for side in tl.static_range(2):
        half = left if side == 0 else right
        place = rows + (tl.arange(0, HALF) + side * HALF)[None, :]
        if BACKWARDS:
            z = tl.load(z_pointer + place, mask=inside, other=0.0)
            half *= slope(z.to(tl.float32), ACTIVATION)
        else:
            # f is taken of z as it is stored: the backward pass sees no other.
            z = half.to(z_pointer.dtype.element_ty)
            tl.store(z_pointer + place, z, mask=inside)
            half = activate(z.to(tl.float32), ACTIVATION)
        tl.store(c_pointer + place, half.to(c_pointer.dtype.element_ty), mask=inside)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """f(z)."""
    if ACTIVATION == "gelu":
        share, _ = _share(z)
        y = z * share
    else:
        tl.static_assert(ACTIVATION == "relu2", "no such activation")
        positive = tl.where(z < 0, 0.0, z)
        y = positive * positive
    return y


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == "gelu":
        share, steepness = _share(z)
        y = share + z * share * (1 - share) * steepness
    else:
        tl.static_assert(ACTIVATION == "relu2", "no such activation")
        y = 2 * tl.where(z < 0, 0.0, z)
    return y


@triton.jit
def _share(z):
    """The share of z that GELU leaves, (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3), and
    the derivative of 2 u."""
    twice = 1.5957691216057308 * z * (1 + 0.044715 * z * z)
    return tl.sigmoid(twice), 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
