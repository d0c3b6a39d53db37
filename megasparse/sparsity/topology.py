"""Which units of one weight matrix live.

A unit is one weight or one b x b block. ``Topology`` wraps the mask of a layer on its unit grid (the layer's own
buffer, changed in place, so that kernels see every change) and gives the forms that others need: counts, bits for
storage, slices of the flat weight for the ranks that hold a piece of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """mask: bool [out_features / unit, in_features / unit], changed in place by ``replace``."""

    name: str
    mask: Tensor
    unit: int

    @property
    def num_units(self) -> int:
        return self.mask.numel()

    @property
    def in_features(self) -> int:
        return self.mask.shape[1] * self.unit

    @property
    def numel(self) -> int:
        return self.mask.numel() * self.unit**2

    def num_live(self) -> int:
        return int(self.mask.sum())

    def dead_rows(self) -> int:
        """Rows of units without a live one: outputs that are constant."""
        return int((~self.mask.any(dim=1)).sum())

    def replace(self, live: Tensor) -> None:
        """Take over a new bool mask of units (any shape with num_units entries)."""
        self.mask.copy_(live.view_as(self.mask))

    def weights_slice(self, start: int, numel: int, units: Tensor | None = None) -> Tensor:
        """The mask of weights [start, start + numel) of the flat matrix, as bool [numel].

        units: another bool tensor on the unit grid to expand in place of the mask.
        """
        grid = self.mask if units is None else units.view_as(self.mask)
        if self.unit == 1:
            return grid.reshape(-1)[start : start + numel]
        first_row, last_row = start // self.in_features, -(-(start + numel) // self.in_features)
        rows = torch.arange(first_row, last_row, device=grid.device) // self.unit
        expanded = grid.index_select(0, rows).repeat_interleave(self.unit, dim=1).reshape(-1)
        offset = start - first_row * self.in_features
        return expanded[offset : offset + numel]


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask of any shape as uint8 bits, eight units to a byte, in row-major order, low bit first."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack_bits(bits: Tensor, num_units: int) -> Tensor:
    """The inverse of ``pack_bits``: bool [num_units]. Raises ValueError where the length does not fit."""
    if bits.numel() != -(-num_units // 8):
        raise ValueError(f"{bits.numel()} bytes of mask bits do not hold {num_units} units")
    unpacked = np.unpackbits(bits.cpu().numpy(), count=num_units, bitorder="little")
    return torch.from_numpy(unpacked.astype(np.bool_))


def digest(topologies: dict[str, Topology]) -> str:
    """SHA-256 over names and bits of all layers: equal on ranks, and across layouts, where the topology is."""
    state = hashlib.sha256()
    for name in sorted(topologies):
        state.update(name.encode())
        state.update(pack_bits(topologies[name].mask).numpy().tobytes())
    return state.hexdigest()
