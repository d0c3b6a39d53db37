"""Levels of 3 or 4 bits without gaps: a row is a string of bits, filled up to whole bytes.

    packed = pack_levels(values, 3)                # uint8 [out, packed_width(in, 3)]
    values = unpack_levels(packed, 3, width=in)

Level v is the number v + 2^(b-1), its lowest bit first; the lowest bit of a byte comes first as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROWS = 256
"""Unpacked at a time: eight bytes for each bit of them are in memory."""


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row."""
    return -(-width * bits // 8)


def pack_levels(values: Tensor, bits: int) -> Tensor:
    """values: int8 [out, in], magnitudes below 2^(bits-1)."""
    packed = np.empty((len(values), packed_width(values.shape[1], bits)), dtype=np.uint8)
    for start in range(0, len(values), ROWS):
        numbers = (values[start : start + ROWS].cpu().numpy() + np.int8(2 ** (bits - 1))).astype(np.uint8)
        each = np.unpackbits(numbers[..., None], axis=-1, count=bits, bitorder="little")
        packed[start : start + ROWS] = np.packbits(each.reshape(len(numbers), -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed)


def unpack_levels(packed: Tensor, bits: int, width: int) -> Tensor:
    """int8 [out, width]."""
    values = np.empty((len(packed), width), dtype=np.int8)
    for start in range(0, len(packed), ROWS):
        part = packed[start : start + ROWS].cpu().numpy()
        each = np.unpackbits(part, axis=-1, count=width * bits, bitorder="little").reshape(len(part), width, bits)
        numbers = np.packbits(each, axis=-1, bitorder="little")[..., 0]
        values[start : start + ROWS] = numbers.astype(np.int8) - np.int8(2 ** (bits - 1))
    return torch.from_numpy(values)
