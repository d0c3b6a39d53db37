"""Whether a run ended as the undisturbed one did, bit for bit.

    found = differences(folder / "runs" / "run", golden)       # sentences; empty: none

Compared are all files of tensors of the newest checkpoint, byte by byte; what its index says but for seconds; every
line of metrics and of topology updates but for seconds; and the sample, which shows what the model computes at its end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCKED = ("seconds", "tokens_per_s")
"""Beginnings of the names of what depends on the clock."""


def differences(run: Path, golden: Path) -> list[str]:
    """How the run in one folder differs from that in the other."""
    return [
        *_of_checkpoints(run, golden),
        *(text for name in ("metrics.jsonl", "topology.jsonl") for text in _of_lines(run / name, golden / name)),
        *_of_bytes(run / "sample.txt", golden / "sample.txt"),
    ]


def newest_step(run: Path) -> int:
    """Of the newest checkpoint that was committed; 0: there is none."""
    found = (index.parent for index in (run / "checkpoints").glob("step-*/index.json"))
    return max((int(path.name[5:]) for path in found if path.name[5:].isdigit() and not path.is_symlink()), default=0)


def _of_checkpoints(run: Path, golden: Path) -> list[str]:
    step = newest_step(golden)
    if newest_step(run) != step:
        return [f"the newest checkpoint is of step {newest_step(run)} instead of {step}"]
    mine, other = (folder / "checkpoints" / f"step-{step:08d}" for folder in (run, golden))
    names = {path.name for folder in (mine, other) for path in folder.iterdir()} - {"index.json"}
    found = [text for name in sorted(names) for text in _of_bytes(mine / name, other / name)]
    first, second = (
        _without_clock(json.loads((folder / "index.json").read_text())["content"]) for folder in (mine, other)
    )
    return found + [f"index.json: {key} differs" for key in sorted(first) if first[key] != second.get(key)]


def _index(folder: Path) -> dict[str, Any]:
    return _without_clock(json.loads((folder / "index.json").read_text(encoding="utf-8"))["content"])


def _of_bytes(mine: Path, other: Path) -> list[str]:
    contents = [path.read_bytes() if path.is_file() else None for path in (mine, other)]
    if contents[0] == contents[1]:
        return []
    return [f"{mine.name} is missing" if contents[0] is None else f"{mine.name} differs"]


def _of_lines(mine: Path, other: Path) -> list[str]:
    contents = [read_lines(path) for path in (mine, other)]
    if contents[0] == contents[1]:
        return []
    steps = [[line.get("step") for line in lines] for lines in contents]
    if steps[0] != steps[1]:
        return [f"{mine.name} has lines of steps {steps[0]} instead of {steps[1]}"]
    odd = next(line["step"] for line, right in zip(*contents, strict=True) if line != right)
    return [f"{mine.name} differs at step {odd}"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of records without what depends on the clock; a line that is none is {"step": None}."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            found.append(_without_clock(json.loads(line)))
        except ValueError:
            found.append({"step": None})
    return found


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(entry) for key, entry in value.items() if not key.startswith(CLOCKED)}
    return value
