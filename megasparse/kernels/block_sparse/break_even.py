"""Break-even densities: below them a block-sparse kernel is faster than dense products, by measurement.

``measured(backend, device, dtype, unit, tokens, widths)`` looks a layer up in the tables of ``common.tables``, whose
rows are

    {"backend": "cpu", "dtype": "float32", "block": 64, "tokens": 2048, "in": 768, "out": 3072,
     "break_even": 0.93, "dense_seconds": 0.4, "seconds": {"0.1": 0.04, ...}}

Among the rows of a machine of the same backend and dtype the nearest one wins, by the sum of the distances of the
logarithms of block, tokens and widths. Where no row fits, FALLBACK is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.common import tables
from megasparse.utils.dtypes import dtype_name

FORMAT = "megasparse-break-even-1"
SHIPPED = Path(__file__).with_name("break_even.json")
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
    def case(self) -> tuple[str, str, int, int, int, int]:
        return self.backend, self.dtype, self.block, self.tokens, self.in_features, self.out_features


def own_table() -> Path:
    """Where tools/tune_kernels.py writes and ``measured`` reads."""
    return tables.own_table("break_even.json")


def read_table(path: Path) -> tuple[tables.Measurement, ...]:
    """The measurements of a file. Raises ValueError naming the file and what is wrong with it."""
    return tables.read_table(path, FORMAT, _row)


def table_problem() -> str | None:
    """What is wrong with the user's own table, which is then passed over; None where nothing is."""
    return tables.read_once(own_table(), FORMAT, _row)[1]


def measured(
    backend: str,
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    widths: tuple[int, int] | None = None,
) -> float:
    """Density above which dense products are faster than `backend`. widths: (in, out); None: of any layer."""
    return _look_up(own_table(), tables.this_machine(device), backend, dtype_name(dtype), block_size, tokens, widths)


@lru_cache(maxsize=4096)
def _look_up(
    own: Path,
    machine: tuple[str, int, str],
    backend: str,
    dtype: str,
    block_size: int,
    tokens: int,
    widths: tuple[int, int] | None,
) -> float:
    def fits(row: Row) -> bool:
        return (row.backend, row.dtype) == (backend, dtype)

    def distance(row: Row) -> float:
        sides = [] if widths is None else [(row.in_features, widths[0]), (row.out_features, widths[1])]
        return sum(tables.ratio(a, b) for a, b in ((row.block, block_size), (row.tokens, tokens), *sides))

    row = tables.nearest((own, SHIPPED), FORMAT, _row, machine, fits, distance)
    return FALLBACK if row is None else row.break_even


def _row(entry: dict[str, Any]) -> Row:
    break_even = float(entry["break_even"])
    if not 0.0 <= break_even <= 1.0:
        raise ValueError(f"break_even: {break_even} is out of range; must be 0 to 1")
    return Row(
        backend=str(entry["backend"]),
        dtype=str(entry["dtype"]),
        block=int(entry["block"]),
        tokens=int(entry["tokens"]),
        in_features=int(entry["in"]),
        out_features=int(entry["out"]),
        break_even=break_even,
        dense_seconds=float(entry["dense_seconds"]),
        seconds={str(density): float(value) for density, value in entry["seconds"].items()},
    )
