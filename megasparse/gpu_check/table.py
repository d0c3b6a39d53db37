"""The tables on the screen, from the JSON file of a check."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from megasparse.gpu_check.context import value_of

REHEARSED = "REHEARSED: tiny shapes on the CPU; no number here says anything of a GPU"


def print_report(path: Path) -> None:
    """Print what the file holds, the verdict last."""
    report = json.loads(path.read_text(encoding="utf-8"))
    for line in lines(report):
        print(line)
    print(f"{path} written")


def lines(report: Mapping[str, Any]) -> Iterable[str]:
    for name, entry in report["sections"].items():
        mark = ", rehearsed" if report["rehearsed"] else ""
        yield f"== {name}: {entry['title']}; {entry['state']} after {entry['seconds']:.0f} s{mark}"
        for title, rows in groupby(entry["rows"], key=lambda row: row["name"]):
            yield from _table(title, list(rows))
        yield from (f"   | {line}" for line in entry["last_lines"])
        yield ""
    if report["rehearsed"]:
        yield REHEARSED
    yield f"status {report['status']}: {report['verdict']}"


def _table(title: str, rows: list[Mapping[str, Any]]) -> Iterable[str]:
    cells = [_cells(row) for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    widths = [max(len(name), *(len(row.get(name, "")) for row in cells)) for name in columns]
    yield f"-- {title}"
    yield "   " + "  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip()
    for row in cells:
        parts = (row.get(name, "").ljust(width) for name, width in zip(columns, widths, strict=True))
        yield "   " + "  ".join(parts).rstrip()


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {name: str(value) for name, value in row["case"].items()}
    cells |= {name: _number(number) for name, number in row["numbers"].items()} | row["facts"]
    if row["right"] is not None:
        cells["result"] = "right" if row["right"] else "WRONG"
    return cells | ({"note": row["note"]} if row["note"] else {})


def _number(number: Mapping[str, float | None]) -> str:
    value = value_of(number)
    text = "n/a" if value is None else f"{value:.4g}"
    return f"({text})" if "rehearsed" in number else text
