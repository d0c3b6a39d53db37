"""Tables of measured break-even points: JSON files of measurements, each with the facts about its machine and rows.

    {"format": "...", "measurements": [{
        "hardware": "AMD EPYC 7543", "model": "25.1", "device": "cpu", "threads": 2, "versions": {...},
        "command": "...", "date": "...", "rows": [...]}]}

Each family has a ``BreakEvenTable`` with a `format` and rows of its own, and two files of it: the user's own in the
cache folder, which runs and tools/tune_kernels.py write, and the shipped one beside the module that reads it. The
user's counts for the hardware and the number of threads that it was measured with; in the other one the measurement of
the same device type counts whose number of threads is nearest, and ``stand_in`` tells of which machine it is. Among the
rows of a machine that are of the kind asked for the nearest one wins, by the sum of the distances of the logarithms of
its sizes. A file is read once per process, or until ``forget``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megasparse.kernels.common.build import cache_folder
from megasparse.utils.files import write_json
from megasparse.utils.hardware import hardware_model, hardware_name


class Machine(NamedTuple):
    """What times depend on. Threads are those of one process; on a GPU they have no part in the work."""

    hardware: str
    model: str
    """Tells processors of one name apart, see ``hardware_model``; empty where nobody has said."""
    device: str
    threads: int

    def counts_for(self, other: Machine) -> bool:
        """Whether times of this machine are times of the other one."""
        same_model = not (self.model and other.model) or self.model == other.model
        same_threads = self.device == "cuda" or self.threads == other.threads
        return (self.hardware, self.device) == (other.hardware, other.device) and same_model and same_threads

    def __str__(self) -> str:
        return self.hardware if self.device == "cuda" else f"{self.hardware}, threads: {self.threads}"


def this_machine(device: str) -> Machine:
    """The one at hand, with as many threads as this process uses."""
    return Machine(hardware_name(device), hardware_model(device), device, torch.get_num_threads())


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
    model: str = ""

    @property
    def machine(self) -> Machine:
        return Machine(self.hardware, self.model, self.device, self.threads)


@dataclass(frozen=True)
class BreakEvenTable:
    """The tables of one family."""

    name: str
    """Of the user's own file."""
    form: str
    shipped: Path
    parse_row: Callable[[dict[str, Any]], Any]
    """An entry of `rows` -> row: a dataclass with the fields of the file and three tuples, of which `kind` must be what
    is asked for, `sizes` may be near to it, and `case` tells the row apart from others of its machine."""

    def own(self) -> Path:
        """Where measurements are written and ``nearest`` reads first."""
        # Layers ask in every step: a path is not put together anew while nothing has changed.
        return _own_table(self.name, *map(os.environ.get, ("MEGASPARSE_CACHE", "XDG_CACHE_HOME", "HOME")))

    def read(self, path: Path) -> tuple[Measurement, ...]:
        """The measurements of a file. Raises ValueError naming the file and what is wrong with it."""
        try:
            entries = read_format(path, self.form)["measurements"]
            return tuple(_measurement(entry, self.parse_row) for entry in entries)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            detail = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}: no table of break-even measurements: {detail}") from None

    def write(self, path: Path, measurements: Iterable[Measurement]) -> None:
        """Replace the file at once, so that a reader sees the old table or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, {"format": self.form, "measurements": [_entry(measurement) for measurement in measurements]})

    def problem(self) -> str | None:
        """What is wrong with the user's own table, which is then passed over; None where nothing is."""
        return read_once(self, self.own())[1]

    def nearest(self, device: str, kind: tuple[str, ...], sizes: tuple[int | None, ...]) -> Any:
        """The nearest row of the kind, of the most trusted machine that has one; None where there is none.

        sizes: None in place of one that does not matter.
        """
        return find_nearest(self, self.own(), this_machine(device), kind, sizes)

    def own_rows(self, device: str, versions: Mapping[str, str] | None = None) -> tuple[Any, ...]:
        """What was measured on this machine with as many threads, the newest first. versions: with these, by name."""
        return own_rows(self, self.own(), this_machine(device), versions)

    def stand_in(self, device: str, kind: tuple[str, ...]) -> Machine | None:
        """The machine whose shipped rows ``nearest`` takes where there are no own ones; None where none are shipped."""
        _, *others = _groups(self, self.own(), this_machine(device))
        return next((of for of, rows in others if any(row.kind == kind for row in rows)), None)


def forget() -> None:
    """Read the files anew: another process, or this one, has written them."""
    read_once.cache_clear()
    find_nearest.cache_clear()


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


@cache
def read_once(table: BreakEvenTable, path: Path) -> tuple[tuple[Measurement, ...], str | None]:
    """The measurements, and what is wrong with the file; a file that is not there holds none."""
    try:
        if not path.exists():
            return (), None
    except OSError as error:
        return (), f"{path}: {error}"
    try:
        return table.read(path), None
    except ValueError as error:
        return (), str(error)


def merged(known: Sequence[Measurement], new: Measurement) -> list[Measurement]:
    """`new` and what is known besides: rows of the same machine and layer are replaced."""
    again = {row.case for row in new.rows}
    kept = [
        replace(old, rows=tuple(row for row in old.rows if row.case not in again))
        if old.machine.counts_for(new.machine)
        else old
        for old in known
    ]
    return [*(old for old in kept if old.rows), new]


@lru_cache(maxsize=4096)
def find_nearest(
    table: BreakEvenTable,
    own: Path,
    machine: Machine,
    kind: tuple[str, ...],
    sizes: tuple[int | None, ...],
) -> Any:
    """See ``BreakEvenTable.nearest``."""
    for _, rows in _groups(table, own, machine):
        if fitting := [row for row in rows if row.kind == kind]:
            return min(fitting, key=lambda row: sum(map(distance, row.sizes, sizes)))
    return None


def own_rows(
    table: BreakEvenTable, own: Path, machine: Machine, versions: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """See ``BreakEvenTable.own_rows``. Of rows that are equally near the first one counts: the newest."""
    mine = [
        measurement
        for measurement in read_once(table, own)[0]
        if measurement.machine.counts_for(machine) and (versions or {}).items() <= measurement.versions.items()
    ]
    return tuple(row for measurement in reversed(mine) for row in measurement.rows)


def _groups(table: BreakEvenTable, own: Path, machine: Machine) -> Iterator[tuple[Machine, tuple[Any, ...]]]:
    """Machines with their rows, the most trusted first: this one, then those of the shipped table."""
    yield machine, own_rows(table, own, machine)
    # Threads of the host have no part in a GPU's work.
    count = (lambda measurement: 1) if machine.device == "cuda" else (lambda measurement: measurement.threads)
    wanted = 1 if machine.device == "cuda" else machine.threads
    others = [m for m in read_once(table, table.shipped)[0] if m.device == machine.device]
    others.sort(key=lambda m: (distance(count(m), wanted), m.hardware != machine.hardware, m.machine))
    for other, group in groupby(others, key=lambda m: m.machine):
        yield other, tuple(row for measurement in group for row in measurement.rows)


def distance(a: int, b: int | None) -> float:
    """Of the logarithms of two sizes; 0 where one does not matter."""
    return 0.0 if b is None else abs(math.log(max(a, 1) / max(b, 1)))


def _measurement(entry: dict[str, Any], parse_row: Callable[[dict[str, Any]], Any]) -> Measurement:
    rows = tuple(parse_row(row) for row in entry["rows"])
    facts = {name: str(entry[name]) for name in ("hardware", "device", "command", "date")}
    threads, model = int(entry["threads"]), str(entry.get("model", ""))
    return Measurement(threads=threads, model=model, versions=dict(entry["versions"]), rows=rows, **facts)


def _entry(measurement: Measurement) -> dict[str, Any]:
    # `in` is no name for a field.
    names = {"in_features": "in", "out_features": "out"}
    rows = [{names.get(name, name): value for name, value in asdict(row).items()} for row in measurement.rows]
    return {**asdict(measurement), "rows": rows}
