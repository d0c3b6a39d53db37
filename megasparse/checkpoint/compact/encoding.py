"""Active units of a matrix to stored values and places, and back: pure functions on tensors.

    values = active_values(weight, mask, unit)
    fill = common_fill(weight, mask, unit)                       # None: inactive entries differ, so store all of them
    assert torch.equal(weight, with_active_values(values, mask, unit, fill))

    stored = encode_places(mask, "bits")
    assert torch.equal(mask, decode_places(stored, "bits", mask.shape, num_active))

Values keep their bit patterns. A mask is stored as one bit per unit (`bits`), or as the numbers of the active units
(`list`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megasparse.sparsity.topology import pack_bits, unpack_bits

FORMS = BITS, LIST = "bits", "list"
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ENTRIES_AT_ONCE = 2**22


def active_values(matrix: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Entries of the active units in their order, row by row of the grid: [n] or, for blocks, [n, unit, unit].

    matrix: [rows, columns]; mask: bool, [rows / unit, columns / unit].
    """
    return torch.cat([_blocks(part, block_size)[active] for part, active in _portions(matrix, mask, block_size)])


def with_active_values(values: Tensor, mask: Tensor, block_size: int, fill: int) -> Tensor:
    """The whole matrix: `values` in active units, the bit pattern `fill` elsewhere."""
    integers = INTEGERS[values.element_size()]
    matrix = torch.full((mask.shape[0] * block_size, mask.shape[1] * block_size), fill, dtype=integers)
    start, values_as_integers = 0, values.contiguous().view(integers)
    for part, active in _portions(matrix, mask, block_size):
        end = start + int(active.count_nonzero())
        _blocks(part, block_size)[active] = values_as_integers[start:end]
        start = end
    return matrix.view(values.dtype)


def common_fill(matrix: Tensor, mask: Tensor, block_size: int) -> int | None:
    """The bit pattern that all entries of inactive units have; None where they differ."""
    fill = None
    for part, active in _portions(matrix.contiguous().view(INTEGERS[matrix.element_size()]), mask, block_size):
        inactive = _blocks(part, block_size)[~active]
        if inactive.numel() == 0:
            continue
        lowest, highest = (int(end) for end in torch.aminmax(inactive))
        if lowest != highest or fill not in (None, lowest):
            return None
        fill = lowest
    return 0 if fill is None else fill


def encode_places(mask: Tensor, form: str) -> Tensor:
    """A mask as stored: uint8 bits, or int32 numbers of units."""
    if form == BITS:
        return pack_bits(mask)
    return torch.from_numpy(np.flatnonzero(mask.numpy()).astype(np.int32))


def decode_places(stored: Tensor, form: str, grid: tuple[int, int], num_active: int) -> Tensor:
    """The inverse of ``encode_places``: bool, the grid. Raises ValueError where what is stored does not fit."""
    num_units = grid[0] * grid[1]
    if form == BITS:
        mask = unpack_bits(stored, num_units)
    else:
        mask = _at(stored.to(torch.int64), num_units)
    if int(mask.count_nonzero()) != num_active:
        raise ValueError(f"a mask of {int(mask.count_nonzero())} active units where {num_active} are announced")
    return mask.view(grid)


def stored_bytes(form: str, num_units: int, num_active: int) -> int:
    """Size of an encoded mask."""
    return -(-num_units // 8) if form == BITS else 4 * num_active


def smallest_form(num_units: int, num_active: int) -> str:
    """Bits, or the list of the active units where that is shorter."""
    return min(FORMS, key=lambda form: stored_bytes(form, num_units, num_active))


def _portions(matrix: Tensor, mask: Tensor, block_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows at a time of a matrix and of its mask: choosing by a mask takes many bytes an entry."""
    rows = max(ENTRIES_AT_ONCE // max(matrix.shape[1] * block_size, 1), 1)
    # An empty matrix has one portion, so that there is something to join.
    for start in range(0, max(mask.shape[0], 1), rows):
        end = min(start + rows, mask.shape[0])
        yield matrix[start * block_size : end * block_size], mask[start:end]


def _blocks(matrix: Tensor, block_size: int) -> Tensor:
    """A view of a matrix by blocks: [rows / unit, columns / unit, unit, unit], or itself where these are weights."""
    if block_size == 1:
        return matrix
    rows, columns = matrix.shape[0] // block_size, matrix.shape[1] // block_size
    return matrix.view(rows, block_size, columns, block_size).permute(0, 2, 1, 3)


def _at(numbers: Tensor, num_units: int) -> Tensor:
    mask = torch.zeros(num_units, dtype=torch.bool)
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_units:
        raise ValueError(f"numbers of active units outside 0 to {num_units - 1}")
    mask[numbers] = True
    return mask
