"""The check: section after section in processes of their own, the JSON file after each, the verdict at the end.

    status = check(sections.choose(None), minutes=9, output=Path("gpu.json"), rehearse=False, say=print)

The README of this folder describes the file.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from megasparse.gpu_check.context import LEFT_OUT, Context, read_rows
from megasparse.gpu_check.processes import DONE, UNAVAILABLE, Outcome, run_limited
from megasparse.gpu_check.sections import MINUTES, Section
from megasparse.utils.files import write_json

FORMAT = "megasparse-gpu-check-1"
RIGHT, WRONG, UNKNOWN = 0, 1, 3
"""Exit statuses: all compared numbers are right; some are wrong; some that were asked for could not be compared."""
NOT_STARTED = "not started"
RESERVED = 0.03
"""Share of the time for imports before the check begins, and for the end of what is killed."""
LEAST_SECONDS = 5.0
"""With less time left no section is begun."""

Report = dict[str, Any]


def check(
    sections: Sequence[Section], *, minutes: float, output: Path, rehearse: bool, say: Callable[[str], Any]
) -> int:
    """Run the sections within `minutes`, write `output` after each, and return the exit status.

    rehearse: tiny shapes on the CPU by Triton's interpreter, every number marked. say: told of each section's begin
    and end. Raises ValueError where there is no GPU to check, OSError where `output` cannot be written.
    """
    deadline = time.monotonic() + 60 * minutes * (1.0 - RESERVED)
    report = new_report(minutes, rehearse)
    write_json(output, report, allow_nan=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not rehearse:
            _need_gpu(folder)
        for section in sections:
            left = deadline - time.monotonic()
            limit = min(section.seconds * minutes / MINUTES, left - 1.0)
            if limit < LEAST_SECONDS * min(1.0, minutes / MINUTES):
                report["sections"][section.name] = entry(section, Outcome(NOT_STARTED, 0.0), 0.0, [])
                say(f"{section.name}: not started, no time left")
            else:
                say(f"{section.name}: {section.title}, for {limit:.0f} s at most")
                found = run_section(section, limit, folder, rehearse, report)
                report["sections"][section.name] = found
                say(f"{section.name}: {found['state']} after {found['seconds']:.0f} s, {len(found['rows'])} rows")
            report["status"], report["verdict"] = verdict(report["sections"])
            write_json(output, report, allow_nan=False)
    return report["status"]


def new_report(minutes: float, rehearse: bool) -> Report:
    return {
        "format": FORMAT,
        "rehearsed": rehearse,
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": platform.node(),
        "minutes": minutes,
        "status": UNKNOWN,
        "verdict": "nothing was compared yet",
        "sections": {},
    }


def run_section(section: Section, limit: float, folder: Path, rehearse: bool, report: Report) -> dict[str, Any]:
    """Run one section; its entry in the file."""
    rows_file = folder / f"{section.name}.jsonl"
    earlier = {name: report["sections"][name]["rows"] for name in section.uses if name in report["sections"]}
    context = Context(limit, rows_file, rehearse, earlier)
    outcome = run_limited(partial(_run, section, context), limit, folder / f"{section.name}.txt")
    return entry(section, outcome, limit, read_rows(rows_file))


def entry(section: Section, outcome: Outcome, limit: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "title": section.title,
        "state": outcome.state,
        "decides": section.decides,
        "limit": round(limit, 1),
        "seconds": round(outcome.seconds, 2),
        "last_lines": list(outcome.last_lines),
        "rows": rows,
    }


def verdict(entries: dict[str, dict[str, Any]]) -> tuple[int, str]:
    """Exit status and what to know, the other sections' troubles at the end."""
    status, sentence = _numerics(entries)
    others = {name: each for name, each in entries.items() if not each["decides"] or each["state"] == UNAVAILABLE}
    troubles = [f"{name} {each['state']}" for name, each in others.items() if each["state"] != DONE]
    wrong = {name: sum(row["right"] is False for row in each["rows"]) for name, each in others.items()}
    troubles += [f"{count} comparisons of {name} wrong" for name, count in wrong.items() if count]
    return status, sentence + (f"; besides: {', '.join(troubles)}" if troubles else "")


def _numerics(entries: dict[str, dict[str, Any]]) -> tuple[int, str]:
    """Exit status and a sentence, from the sections that decide.

    A section that lacks a package does not decide: nothing of it could ever be compared on this machine.
    """
    deciding = {name: each for name, each in entries.items() if each["decides"] and each["state"] != UNAVAILABLE}
    rows = [(name, row) for name, each in deciding.items() for row in each["rows"]]
    compared = [(name, row) for name, row in rows if row["right"] is not None]
    wrong = [f"{name}: {row['name']} {row['case']}" for name, row in compared if not row["right"]]
    if wrong:
        return WRONG, f"{len(wrong)} of {len(compared)} comparisons are wrong, the first: {wrong[0]}"
    broken = [f"{name} ({each['state']})" for name, each in deciding.items() if each["state"] != DONE]
    broken += [f"{name} (no time for all)" for name, row in rows if row["name"] == LEFT_OUT]
    if broken:
        return UNKNOWN, f"{len(compared)} comparisons are right, but not all were made: {', '.join(broken)}"
    if not deciding:
        return RIGHT, "nothing was compared"
    return RIGHT, f"all {len(compared)} comparisons are right"


def _run(section: Section, context: Context) -> None:
    """In the process of the section."""
    if context.rehearse:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if section.kernels_only:  # before Triton is imported
            os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    import_module(section.module).run(context)


def _need_gpu(folder: Path) -> None:
    """Asked in a process of its own: to ask opens the driver, which a fork would not survive."""
    outcome = run_limited(_find_gpu, 60, folder / "gpu.txt")
    if outcome.state != DONE:
        raise ValueError(
            f"no GPU that the kernels run on ({outcome.last_lines[-2] if len(outcome.last_lines) > 1 else 'no answer'})"
            "; --rehearse tries this command without one"
        )


def _find_gpu() -> None:
    from megasparse.kernels.common.triton_device import missing_triton, unsuited_device

    reason = unsuited_device() or missing_triton()
    if reason:
        print(reason)
        raise SystemExit(1)
