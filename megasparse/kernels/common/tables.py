"""Tables of measured break-even points: JSON files of measurements, each with the facts about its machine and rows.

    {"format": "...", "measurements": [{
        "hardware": "AMD EPYC 7543", "device": "cpu", "threads": 2, "versions": {...}, "command": "...", "date": "...",
        "rows": [...]}]}

Each family has a `format` and rows of its own kind. There are two tables of each: the user's own, a file in the cache
folder that tools/tune_kernels.py writes, and the shipped one beside the module that reads it. The user's counts for
the hardware and the number of threads that it was measured with; in the other one the measurement of the same device
type counts whose number of threads is nearest. A table is read once per process.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from megasparse.kernels.common.build import cache_folder
from megasparse.utils.files import write_json
from megasparse.utils.hardware import hardware_name

ParseRow = Callable[[dict[str, Any]], Any]
"""An entry of `rows` -> row. A row has a `case`, which tells it apart from others of its machine."""


@dataclass(frozen=True)
class Measurement:
    """Rows measured by one command."""

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


def own_table(name: str) -> Path:
    """Of that name in the cache folder."""
    # Layers ask in every step: a path is not put together anew while nothing has changed.
    return _own_table(name, *map(os.environ.get, ("MEGASPARSE_CACHE", "XDG_CACHE_HOME", "HOME")))


@cache
def _own_table(name: str, *variables: str | None) -> Path:
    return cache_folder() / name


def read_format(path: Path, form: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where it is none, or not of the format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict) or content.get("format") != form:
        raise ValueError(f"its format is not {form}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read_table(path: Path, form: str, parse_row: ParseRow) -> tuple[Measurement, ...]:
    """The measurements of a file. Raises ValueError naming the file and what is wrong with it."""
    try:
        return tuple(_measurement(entry, parse_row) for entry in read_format(path, form)["measurements"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        detail = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: no table of break-even measurements: {detail}") from None


@cache
def read_once(path: Path, form: str, parse_row: ParseRow) -> tuple[tuple[Measurement, ...], str | None]:
    """The measurements, and what is wrong with the file; a file that is not there holds none."""
    try:
        if not path.exists():
            return (), None
    except OSError as error:
        return (), f"{path}: {error}"
    try:
        return read_table(path, form, parse_row), None
    except ValueError as error:
        return (), str(error)


def write_table(path: Path, measurements: Iterable[Measurement], form: str) -> None:
    """Replace the file at once, so that a reader sees the old table or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(path, {"format": form, "measurements": [_entry(measurement) for measurement in measurements]})


def merged(known: Sequence[Measurement], new: Measurement) -> list[Measurement]:
    """`new` and what is known besides: rows of the same machine and layer are replaced."""
    again = {row.case for row in new.rows}
    kept = [
        replace(old, rows=tuple(row for row in old.rows if old.machine != new.machine or row.case not in again))
        for old in known
    ]
    return [*(old for old in kept if old.rows), new]


def this_machine(device: str) -> tuple[str, int, str]:
    """Hardware, number of threads and device type."""
    return hardware_name(device), torch.get_num_threads(), device


def nearest(
    paths: tuple[Path, Path],
    form: str,
    parse_row: ParseRow,
    machine: tuple[str, int, str],
    fits: Callable[[Any], bool],
    distance: Callable[[Any], float],
) -> Any:
    """The nearest row that fits, of the most trusted machine that has one; None where no row fits.

    paths: the user's own table and the shipped one.
    """
    own, shipped = (read_once(path, form, parse_row)[0] for path in paths)
    hardware, threads, device = machine
    # Threads of the host have no part in a GPU's work.
    count = (lambda measurement: 1) if device == "cuda" else (lambda measurement: measurement.threads)
    wanted = 1 if device == "cuda" else threads
    mine = [m for m in own if (m.hardware, m.device, count(m)) == (hardware, device, wanted)]
    others = [m for m in shipped if m.device == device]
    others.sort(key=lambda m: (ratio(count(m), wanted), m.hardware != hardware, m.machine))
    for group in (mine, *(list(group) for _, group in groupby(others, key=lambda m: m.machine))):
        rows = [row for measurement in group for row in measurement.rows if fits(row)]
        if rows:
            return min(rows, key=distance)
    return None


def ratio(a: int, b: int) -> float:
    """How far apart two sizes are: the distance of their logarithms."""
    return abs(math.log(max(a, 1) / max(b, 1)))


def _measurement(entry: dict[str, Any], parse_row: ParseRow) -> Measurement:
    rows = tuple(parse_row(row) for row in entry["rows"])
    facts = {name: str(entry[name]) for name in ("hardware", "device", "command", "date")}
    return Measurement(threads=int(entry["threads"]), versions=dict(entry["versions"]), rows=rows, **facts)


def _entry(measurement: Measurement) -> dict[str, Any]:
    # `in` is no name for a field.
    names = {"in_features": "in", "out_features": "out"}
    rows = [{names.get(name, name): value for name, value in asdict(row).items()} for row in measurement.rows]
    return {**asdict(measurement), "rows": rows}
