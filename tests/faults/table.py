"""The table of what came of all tries, from the lines that the driver has appended.

print(table(read_results(Path("results.jsonl"))))
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attempt import HUNG, LOST, REFUSED, SILENT, SURVIVED, TRACEBACK

COLUMNS = (SURVIVED, REFUSED, SILENT, HUNG, TRACEBACK, LOST)
HEADINGS = ("survived", "refused with a sentence", "silent", "hung", "traceback", "steps lost")


def read_results(path: Path) -> list[dict[str, Any]]:
    """Lines of the driver; one that was cut off by an interruption is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def table(results: Iterable[dict[str, Any]]) -> str:
    """A row for each kind, and one for all."""
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result["kind"], Counter())[result["outcome"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    rows = [
        [kind, str(sum(count.values())), *(str(count[column]) for column in COLUMNS)] for kind, count in counts.items()
    ]
    rows.insert(0, ["kind of fault", "tries", *HEADINGS])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])
