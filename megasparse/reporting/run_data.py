"""Reads a run folder for the report: whatever is there, with a remark for whatever is missing or damaged.

``read_run(folder)`` never fails because of a file's content: a run may have been killed in the middle of a line,
resumed from an older step, or stopped before its summary was written. Nothing is left out silently, every gap ends
up in ``RunData.remarks``.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megasparse.utils.format import finite
from megasparse.utils.json_lines import name_lines

Record = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """One frame of a film strip: the file, its step, and the density of the layer that was logged for it."""

    path: Path
    step: int
    density: float | None


@dataclass(frozen=True)
class Film:
    """All pictures of one layer, ordered by step."""

    layer: str
    pictures: tuple[Picture, ...]


@dataclass
class RunData:
    """What a run folder holds. Absent files give empty containers and a remark."""

    name: str
    plan: Record = field(default_factory=dict)
    summary: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    """One record per step, ordered by step; of repeated steps the last one."""
    topology: list[Record] = field(default_factory=list)
    """One record per topology update, likewise."""
    films: list[Film] = field(default_factory=list)
    config: str | None = None
    sample: str | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.summary.get("finished") is True

    @property
    def last_step(self) -> int:
        return max([int(record["step"]) for record in self.metrics], default=0)

    @property
    def planned_steps(self) -> int:
        """Steps of the plan, or those that were run where there is no plan."""
        planned = finite(self.plan.get("steps"))
        return max(int(planned or 0), self.last_step)

    def latest(self, key: str) -> float | None:
        """The last finite value of a metric."""
        _, values = column(self.metrics, key)
        return float(values[-1]) if len(values) else None

    def number(self, key: str, metric: str | None = None) -> float | None:
        """A number of the summary, or the last value of `metric` (the same name) where the summary lacks it."""
        value = finite(self.summary.get(key))
        return self.latest(metric or key) if value is None else value

    def phase_spans(self) -> list[tuple[str, float, float]]:
        """(phase, first step, last step) from the plan, or as logged where the plan has none."""
        spans: list[tuple[str, float, float]] = []
        for phase in items(lookup(self.plan, "schedule", "phases")):
            name = str(phase.get("name"))
            start, end = (finite(phase.get(key)) for key in ("start_step", "end_step"))
            if start is None or end is None or end <= start:
                continue
            # The plan cuts a phase where the attention pattern changes; here it is one.
            continues = bool(spans) and spans[-1][0] == name and spans[-1][2] == start
            start = spans.pop()[1] if continues else start
            spans.append((name, start, end))
        return spans or spans_of(self.metrics, "phase")


def read_run(folder: Path) -> RunData:
    """Read everything that the report shows.

    Raises ValueError where `folder` is no directory.
    """
    if not folder.is_dir():
        raise ValueError(f"run folder: {str(folder)!r} is not a directory; must be the folder of a run")
    remarks: list[str] = []
    plan = _read_object(folder / "plan.json", remarks)
    summary = _read_object(folder / "summary.json", remarks)
    metrics = _read_records(folder / "metrics.jsonl", "loss", remarks)
    topology = _read_records(folder / "topology.jsonl", "densities", remarks)
    run = RunData(
        name=str(summary.get("run") or plan.get("run") or folder.resolve().name),
        plan=plan,
        summary=summary,
        metrics=metrics,
        topology=topology,
        films=_find_films(folder / "topology", topology, remarks),
        config=_read_text(folder / "config.yaml", remarks),
        sample=_read_text(folder / "sample.txt", remarks),
        remarks=remarks,
    )
    unusable = sum("loss" in record and finite(record["loss"]) is None for record in metrics)
    if unusable:
        remarks.append(f"{unusable} logged steps have a loss that is not a finite number; the curves leave them out.")
    return run


def column(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, both float64 of equal length, of the records in which `key` is a finite number."""
    pairs = [(record["step"], number) for record in records if (number := finite(record.get(key))) is not None]
    array = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def spans_of(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, float, float]]:
    """(value, first step, last step) of each stretch in which a logged word stays the same, without gaps."""
    spans: list[tuple[str, float, float]] = []
    previous_step = 0.0
    for record in records:
        if not isinstance(record.get(key), str):
            continue
        name, step = record[key], float(record["step"])
        if spans and spans[-1][0] == name:
            spans[-1] = (name, spans[-1][1], step)
        elif step > previous_step:
            spans.append((name, previous_step, step))
        previous_step = step
    return spans


def lookup(tree: Any, *keys: str) -> Any:
    """The value at a path through nested dictionaries, or None."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def items(value: Any) -> list[Mapping[str, Any]]:
    """The dictionaries in a list, or nothing where there is no list."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sorting key that puts `layers.2` before `layers.10`."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _read_text(path: Path, remarks: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        remarks.append(f"{path.name} is missing.")
    except OSError as error:
        remarks.append(f"{path.name} cannot be read: {error.strerror}.")
    return None


def _read_object(path: Path, remarks: list[str]) -> Record:
    text = _read_text(path, remarks)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        remarks.append(f"{path.name} is not valid JSON.")
        return {}
    if isinstance(value, dict):
        return value
    remarks.append(f"{path.name} does not hold a JSON object.")
    return {}


def _read_records(path: Path, essential_key: str, remarks: list[str]) -> list[Record]:
    """The lines of a log, one record per step.

    A resumed run goes back to an earlier step: a complete line (one with `essential_key`) at or before the newest
    complete one takes the place of all that was logged from its step on. Incomplete lines, such as those of a
    validation, are merged into their step.
    """
    text = _read_text(path, remarks)
    if text is None:
        return []
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    by_step: dict[int, Record] = {}
    newest, damaged, last_is_cut = -1, list[int](), False
    for position, (number, line) in enumerate(lines, 1):
        record = _parse_record(line)
        if record is None:
            damaged.append(number)
            last_is_cut = position == len(lines)
            continue
        step = record["step"]
        if essential_key in record:
            if step <= newest:
                by_step = {other: kept for other, kept in by_step.items() if other < step}
            newest = step
        by_step[step] = {**by_step.get(step, {}), **record}
    if last_is_cut:
        damaged.pop()
        remarks.append(f"The last line of {path.name} is cut off, as after a kill; it is left out.")
    if damaged:
        remarks.append(f"{path.name}: {name_lines(damaged)} cannot be read: left out.")
    if not by_step:
        remarks.append(f"{path.name} holds no readable line.")
    return [by_step[step] for step in sorted(by_step)]


def _parse_record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or finite(record.get("step")) is None:
        return None
    record["step"] = int(record["step"])
    # A validation that did not take place is not a value that could hide an earlier one of the same step.
    return {key: value for key, value in record.items() if value is not None}


def _find_films(folder: Path, topology: list[Record], remarks: list[str]) -> list[Film]:
    if not folder.is_dir():
        remarks.append("The folder topology with pictures of the topology is missing.")
        return []
    topology_steps = [record["step"] for record in topology]
    films = []
    layers = (path for path in folder.iterdir() if path.is_dir())
    for layer in sorted(layers, key=lambda path: natural_order(path.name)):
        pictures = []
        for path in layer.glob("step-*.png"):
            digits = path.stem.removeprefix("step-")
            if not digits.isdecimal():
                continue
            # A topology holds until the next topology update.
            position = bisect.bisect_right(topology_steps, int(digits))
            record = topology[position - 1] if position else {}
            pictures.append(Picture(path, int(digits), finite(lookup(record, "densities", layer.name))))
        if pictures:
            films.append(Film(layer.name, tuple(sorted(pictures, key=lambda picture: picture.step))))
    if not films:
        remarks.append("The folder topology holds no pictures.")
    return films
