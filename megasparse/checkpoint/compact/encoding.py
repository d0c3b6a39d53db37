"""Active units of a matrix to stored values and places, and back: pure functions on tensors.

    values = active_values(weight, mask, unit)
    fill = common_fill(weight, mask, unit)                       # None: inactive entries differ, so store all of them
    assert torch.equal(weight, with_active_values(values, mask, unit, fill))

    stored = encode_places(mask, "bits")
    assert torch.equal(mask, decode_places(stored, "bits", mask.shape, num_active))

Values keep their bit patterns. A mask is stored as one bit per unit (`bits`), as the numbers of the active units
(`list`), or, where exactly n of every m consecutive weights of a row are active, as their places in each group (`n:m`,
such as `2:4`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from megasparse.sparsity.topology import pack_bits, unpack_bits

BITS, LIST = "bits", "list"
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
ENTRIES_AT_ONCE = 2**22
PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


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
    """A mask as stored: uint8 bits, int32 numbers of units, or uint8 bits of places in groups.

    Raises ValueError where `form` is n:m and the mask does not conform.
    """
    if form == BITS:
        return pack_bits(mask)
    if form == LIST:
        return torch.from_numpy(np.flatnonzero(mask.numpy()).astype(np.int32))
    n, m = parse_pattern(form)
    check_pattern(mask, n, m)
    places = torch.from_numpy(np.flatnonzero(mask.numpy()) % m)
    bits = (places.unsqueeze(1) >> torch.arange(_place_bits(m))) & 1
    return pack_bits(bits.to(torch.bool))


def decode_places(stored: Tensor, form: str, grid: tuple[int, int], num_active: int) -> Tensor:
    """The inverse of ``encode_places``: bool, the grid. Raises ValueError where what is stored does not fit."""
    num_units = grid[0] * grid[1]
    if form == BITS:
        mask = unpack_bits(stored, num_units)
    elif form == LIST:
        mask = _at(stored.to(torch.int64), num_units)
    else:
        n, m = parse_pattern(form)
        bits = unpack_bits(stored, num_units // m * n * _place_bits(m)).view(-1, _place_bits(m))
        places = (bits.to(torch.int64) << torch.arange(_place_bits(m))).sum(dim=1)
        mask = _at(places + torch.arange(num_units // m).repeat_interleave(n) * m, num_units)
    if int(mask.count_nonzero()) != num_active:
        raise ValueError(f"a mask of {int(mask.count_nonzero())} active units where {num_active} are announced")
    return mask.view(grid)


def stored_bytes(form: str, num_units: int, num_active: int) -> int:
    """Size of an encoded mask."""
    if form == BITS:
        return -(-num_units // 8)
    if form == LIST:
        return 4 * num_active
    _, m = parse_pattern(form)
    return -(-num_active * _place_bits(m) // 8)


def smallest_form(num_units: int, num_active: int) -> str:
    """Bits, or the list of the active units where that is shorter."""
    return min((BITS, LIST), key=lambda form: stored_bytes(form, num_units, num_active))


def parse_pattern(text: str) -> tuple[int, int]:
    """n and m of a pattern such as 2:4. Raises ValueError."""
    match = PATTERN.fullmatch(text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"--n-of-m: {text!r}; must be N:M with 0 < N < M < 100, such as 2:4")
    return int(match[1]), int(match[2])


def check_pattern(mask: Tensor, n: int, m: int) -> None:
    """Raise ValueError unless exactly n of every m consecutive units of a row are active."""
    if mask.shape[1] % m:
        raise ValueError(f"its rows of {mask.shape[1]} weights are no groups of {m}")
    counts = mask.reshape(-1, m).sum(dim=1)
    wrong = int((counts != n).sum())
    if wrong:
        raise ValueError(f"{wrong} of its {counts.numel()} groups of {m} weights have other than {n} active ones")


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


def _place_bits(m: int) -> int:
    return (m - 1).bit_length()
