"""Break-even densities: below them a block-sparse kernel is faster than dense products, by measurement.

``measured(backend, device, dtype, unit, tokens, widths)`` looks a layer up in the tables of ``common.tables``, whose
rows are

    {"backend": "cpu", "dtype": "float32", "block": 64, "tokens": 2048, "in": 768, "out": 3072,
     "break_even": 0.93, "dense_seconds": 0.4, "seconds": {"0.1": 0.04, ...}}

A row of the same backend and dtype fits; block, tokens and widths say how near it is. Where no row fits, FALLBACK is
assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.common.tables import BreakEvenTable
from megasparse.utils.dtypes import dtype_name

FALLBACK = 0.5
"""For backends that nobody measured: saves most of what can be saved, and costs little where it is wrong."""


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

    @property
    def kind(self) -> tuple[str, ...]:
        return self.backend, self.dtype

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.block, self.tokens, self.in_features, self.out_features

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
    return FALLBACK if row is None else row.break_even


def _row(entry: dict[str, Any]) -> Row:
    break_even = float(entry["break_even"])
    if not 0.0 <= break_even <= 1.0:
        raise ValueError(f"break_even: {break_even} is out of range; must be 0 to 1")
    backend, dtype = (str(entry[name]) for name in ("backend", "dtype"))
    block, tokens, inner, outer = (int(entry[name]) for name in ("block", "tokens", "in", "out"))
    seconds = {str(density): float(value) for density, value in entry["seconds"].items()}
    return Row(backend, dtype, block, tokens, inner, outer, break_even, float(entry["dense_seconds"]), seconds)


SHIPPED = Path(__file__).with_name("break_even.json")
TABLE = BreakEvenTable("break_even.json", "megasparse-break-even-1", SHIPPED, _row)
