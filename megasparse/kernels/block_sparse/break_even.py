"""Break-even densities: below them a block-sparse kernel is faster than dense products, by measurement.

``measured(backend, device, dtype, unit, tokens, widths)`` looks a layer up, first in the user's own table (a file in
the cache folder that tools/tune_kernels.py writes), then in the table beside this module. Both are JSON:

    {"format": "megasparse-break-even-1", "measurements": [{
        "hardware": "AMD EPYC 7543", "device": "cpu", "threads": 2, "versions": {...}, "command": "...", "date": "...",
        "rows": [{"backend": "cpu", "dtype": "float32", "block": 64, "tokens": 2048, "in": 768, "out": 3072,
                  "break_even": 0.93, "dense_seconds": 0.4, "seconds": {"0.1": 0.04, ...}}, ...]}]}

The user's table counts for the hardware and the number of threads that it was measured with; in the other one the
measurement of the same device type counts whose number of threads is nearest. Among its rows of the same backend and
dtype the nearest one wins, by the sum of the distances of the logarithms of block, tokens and widths. Where no row
fits, FALLBACK is assumed. A table is read once per process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.block_sparse.build import cache_folder
from megasparse.utils.dtypes import dtype_name
from megasparse.utils.files import write_json
from megasparse.utils.hardware import hardware_name

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


@dataclass(frozen=True)
class Measurement:
    """Rows measured by one command; other tables keep rows of their own kind, with a `case`."""

    hardware: str
    device: str
    threads: int
    rows: tuple[Any, ...]
    versions: dict[str, str]
    command: str = ""
    date: str = ""

    @property
    def machine(self) -> tuple[str, str, int]:
        return self.hardware, self.device, self.threads


def own_table() -> Path:
    """Where tools/tune_kernels.py writes and ``measured`` reads."""
    # Layers ask in every step: a path is not put together anew while nothing has changed.
    return _own_table(*map(os.environ.get, ("MEGASPARSE_CACHE", "XDG_CACHE_HOME", "HOME")))


@cache
def _own_table(*variables: str | None) -> Path:
    return cache_folder() / "break_even.json"


def measured(
    backend: str,
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    widths: tuple[int, int] | None = None,
) -> float:
    """Density above which dense products are faster than `backend`. widths: (in, out); None: of any layer."""
    threads = torch.get_num_threads()
    return _look_up(own_table(), hardware_name(device), threads, backend, device, dtype, block_size, tokens, widths)


def table_problem() -> str | None:
    """What is wrong with the user's own table, which is then passed over; None where nothing is."""
    return _read_once(own_table())[1]


def read_table(
    path: Path, form: str = FORMAT, parse_row: Callable[[dict[str, Any]], Any] | None = None
) -> tuple[Measurement, ...]:
    """The measurements of a file. Raises ValueError naming the file and what is wrong with it.

    parse_row: an entry of `rows` -> row; None: `Row`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != form:
            raise ValueError(f"its format is not {form}")
        return tuple(_measurement(entry, parse_row or _row) for entry in content["measurements"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else error
        what = "break-even densities" if form == FORMAT else form
        raise ValueError(f"{path}: no table of {what}: {detail}") from None


def write_table(path: Path, measurements: Iterable[Measurement], form: str = FORMAT) -> None:
    """Replace the file at once, so that a reader sees the old table or the new one."""
    content = {"format": form, "measurements": [_entry(measurement) for measurement in measurements]}
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path, content)


def merged(known: Sequence[Measurement], new: Measurement) -> list[Measurement]:
    """`new` and what is known besides: rows of the same machine and layer are replaced."""
    again = {row.case for row in new.rows}
    kept = [
        replace(old, rows=tuple(row for row in old.rows if old.machine != new.machine or row.case not in again))
        for old in known
    ]
    return [*(old for old in kept if old.rows), new]


@lru_cache(maxsize=4096)
def _look_up(
    own: Path,
    hardware: str,
    threads: int,
    backend: str,
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    widths: tuple[int, int] | None,
) -> float:
    for rows in candidates(_read_once(own)[0], _read_once(SHIPPED)[0], hardware, threads, device):
        rows = [row for row in rows if (row.backend, row.dtype) == (backend, dtype_name(dtype))]
        if rows:
            return min(rows, key=lambda row: _distance(row, block_size, tokens, widths)).break_even
    return FALLBACK


def candidates(
    own: Iterable[Measurement], shipped: Iterable[Measurement], hardware: str, threads: int, device: str
) -> list[list[Any]]:
    """Rows of the machines that come into question, the most trusted machine first."""
    # Threads of the host have no part in a GPU's work.
    count = (lambda measurement: 1) if device == "cuda" else (lambda measurement: measurement.threads)
    wanted = 1 if device == "cuda" else threads
    mine = [m for m in own if (m.hardware, m.device, count(m)) == (hardware, device, wanted)]
    others = [m for m in shipped if m.device == device]
    others.sort(key=lambda m: (ratio(count(m), wanted), m.hardware != hardware, m.machine))
    groups = [mine, *(list(group) for _, group in groupby(others, key=lambda m: m.machine))]
    return [[row for measurement in group for row in measurement.rows] for group in groups]


def _distance(row: Row, block_size: int, tokens: int, widths: tuple[int, int] | None) -> float:
    distance = ratio(row.block, block_size) + ratio(row.tokens, tokens)
    if widths is not None:
        distance += ratio(row.in_features, widths[0]) + ratio(row.out_features, widths[1])
    return distance


def ratio(a: int, b: int) -> float:
    """How far apart two sizes are: the distance of their logarithms."""
    return abs(math.log(max(a, 1) / max(b, 1)))


@cache
def _read_once(path: Path) -> tuple[tuple[Measurement, ...], str | None]:
    """The measurements, and what is wrong with the file; a file that is not there holds none."""
    if not path.exists():
        return (), None
    try:
        return read_table(path), None
    except ValueError as error:
        return (), str(error)


def _measurement(entry: dict[str, Any], parse_row: Callable[[dict[str, Any]], Any]) -> Measurement:
    rows = tuple(parse_row(row) for row in entry["rows"])
    facts = {name: str(entry[name]) for name in ("hardware", "device", "command", "date")}
    return Measurement(threads=int(entry["threads"]), versions=dict(entry["versions"]), rows=rows, **facts)


def _row(entry: dict[str, Any]) -> Row:
    break_even = float(entry["break_even"])
    if not 0.0 <= break_even <= 1.0:
        raise ValueError(f"break_even: {break_even} is out of range; must be 0 to 1")
    numbers = {name: int(entry[name]) for name in ("block", "tokens")}
    return Row(
        backend=str(entry["backend"]),
        dtype=str(entry["dtype"]),
        in_features=int(entry["in"]),
        out_features=int(entry["out"]),
        break_even=break_even,
        dense_seconds=float(entry["dense_seconds"]),
        seconds={str(density): float(value) for density, value in entry["seconds"].items()},
        **numbers,
    )


def _entry(measurement: Measurement) -> dict[str, Any]:
    names = {"in_features": "in", "out_features": "out"}
    rows = [{names.get(name, name): value for name, value in asdict(row).items()} for row in measurement.rows]
    return {**asdict(measurement), "rows": rows}
