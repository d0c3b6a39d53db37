"""Break-even densities: below them a block-sparse kernel is faster than dense products, by measurement.

``measured(backend, device, dtype, unit, tokens, widths)`` looks a layer up in the tables of ``common.tables``, whose
rows are

    {"backend": "cpu", "dtype": "float32", "block": 64, "tokens": 2048, "in": 768, "out": 3072,
     "break_even": 0.93, "dense_seconds": 0.4, "seconds": {"0.1": 0.04, ...}, "host_seconds": {"dense": 0.1, ...},
     "counts_for": [8192, 768, 50304]}

A row of the same backend and dtype fits; block, tokens and widths say how near it is. Where no row fits, ``unmeasured``
tells what is assumed. Seconds are the device's; those that the host needs to hand the work out are kept beside them.
A row that was measured with fewer tokens or less width than a layer has, to save time, counts for those of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.common.tables import BreakEvenTable
from megasparse.utils.dtypes import dtype_name

FALLBACK = 0.5
"""For backends on CPUs that nobody measured: saves most of what can be saved, and costs little where it is wrong."""

GPU_FALLBACK = {64: 0.3, 128: 0.45}
"""By block, on GPUs that nobody measured: forecast from the tiles of an H100. A tile of the input serves one column of
blocks, so that traffic caps the share of the dense speed in proportion to the block."""


@dataclass(frozen=True)
class Row:
    """One layer, forward and backward, against dense products. Fields are named as in the file but for the widths."""

    backend: str
    dtype: str
    block: int
    tokens: int
    in_features: int
    out_features: int
    break_even: float
    dense_seconds: float
    seconds: dict[str, float]
    """By density."""
    host_seconds: dict[str, float] = field(default_factory=dict)
    """Of the host, which hands the work out, by density and `dense`; empty where the host does it itself."""
    counts_for: tuple[int, ...] = ()
    """(tokens, in, out) in place of the measured ones where the row is looked up; empty: those that were measured."""

    @property
    def kind(self) -> tuple[str, ...]:
        return self.backend, self.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.block, *(self.counts_for or (self.tokens, self.in_features, self.out_features))

    @property
    def case(self) -> tuple[str | int, ...]:
        return *self.kind, *self.sizes


def measured(
    backend: str,
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    widths: tuple[int, int] | None = None,
) -> float:
    """Density above which dense products are faster than `backend`. widths: (in, out); None: of any layer."""
    sizes = block_size, tokens, *(widths or (None, None))
    row = TABLE.nearest(device, (backend, dtype_name(dtype)), sizes)
    return unmeasured(device, block_size) if row is None else row.break_even


def unmeasured(device: str, block_size: int) -> float:
    """The break-even density that is assumed where no row fits."""
    if device != "cuda":
        return FALLBACK
    smallest, largest = min(GPU_FALLBACK), max(GPU_FALLBACK)
    if block_size >= largest:
        return GPU_FALLBACK[largest]
    return GPU_FALLBACK[smallest] * min(block_size / smallest, 1.0)


def _row(entry: dict[str, Any]) -> Row:
    break_even = float(entry["break_even"])
    if not 0.0 <= break_even <= 1.0:
        raise ValueError(f"break_even: {break_even} is out of range; must be 0 to 1")
    backend, dtype = (str(entry[name]) for name in ("backend", "dtype"))
    block, tokens, inner, outer = (int(entry[name]) for name in ("block", "tokens", "in", "out"))
    dense = float(entry["dense_seconds"])
    seconds, host = (
        {str(density): float(value) for density, value in times.items()}
        for times in (entry["seconds"], entry.get("host_seconds", {}))
    )
    stands_for = tuple(int(size) for size in entry.get("counts_for", ()))
    if len(stands_for) not in (0, 3):
        raise ValueError(f"counts_for: {list(stands_for)} has {len(stands_for)} entries; must be tokens, in and out")
    return Row(backend, dtype, block, tokens, inner, outer, break_even, dense, seconds, host, stands_for)


SHIPPED = Path(__file__).with_name("break_even.json")
TABLE = BreakEvenTable("break_even.json", "megasparse-break-even-1", SHIPPED, _row)
