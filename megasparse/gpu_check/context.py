"""What a section knows of its check, and how it tells what it finds: one row after another, none of them lost.

    for case in context.in_time(cases):
        context.row("copy", {"bytes": size}, {"bytes_per_second": rate})

A row is one line of JSON, written at once: whatever becomes of the process, the rows before stay.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from megasparse.gpu_check.timing import DeviceClock, HostClock

Case = TypeVar("Case")
LEFT_OUT = "left out"
"""Name of the row that counts the cases for which there was no time."""


@dataclass(frozen=True)
class Context:
    """Of one section, in its process."""

    seconds: float
    """Time limit of the section."""
    rows_file: Path
    rehearse: bool = False
    """Tiny shapes on the CPU, to try the check itself: no number says anything of a GPU."""
    earlier: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Rows of earlier sections by section."""
    started: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @cached_property
    def clock(self) -> DeviceClock | HostClock:
        return HostClock() if self.rehearse else DeviceClock()

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.started + self.seconds - time.monotonic()

    def in_time(self, cases: Sequence[Case], what: str) -> Iterator[Case]:
        """The cases while there is time for one more as long as the longest so far; then a row that counts the rest."""
        longest, begun = 0.0, time.monotonic()
        for number, case in enumerate(cases):
            if self.left < 1.5 * longest + 0.03 * self.seconds:
                self.row(LEFT_OUT, {"what": what}, {"cases": len(cases) - number}, note="no time left")
                return
            yield case
            now = time.monotonic()
            longest, begun = max(longest, now - begun), now

    def row(
        self,
        name: str,
        case: Mapping[str, Any] | None = None,
        numbers: Mapping[str, float | None] | None = None,
        *,
        facts: Mapping[str, str] | None = None,
        right: bool | None = None,
        note: str = "",
    ) -> None:
        """Tell one finding.

        case: the settings that it was made with. numbers: what was found, each marked as measured or rehearsed.
        facts: names and versions. right: whether numbers are what they must be; None: nothing was compared.
        """
        row = {
            "name": name,
            "case": dict(case or {}),
            "numbers": {key: self.marked(value) for key, value in (numbers or {}).items()},
            "facts": dict(facts or {}),
            "right": right,
            "note": note,
        }
        with self.rows_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def marked(self, value: float | None) -> dict[str, float | None]:
        """The number under its mark; None in place of what is not finite."""
        finite = value is not None and math.isfinite(value)
        return {"rehearsed" if self.rehearse else "measured": value if finite else None}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of rows; of a process that was killed the last one may be broken off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def value_of(number: Mapping[str, float | None]) -> float | None:
    """Of a marked number, whatever its mark."""
    (value,) = number.values()
    return value
