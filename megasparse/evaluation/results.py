"""What rank 0 shows and writes: a progress bar, a table, a JSON file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from megasparse.utils.files import write_json
from megasparse.utils.format import MISSING, finite

LINES_OF_A_LOG = 10
"""Lines of progress where the output is no terminal."""

Advance = Callable[[int, int], None]


@contextlib.contextmanager
def show_progress(console: Console | None) -> Iterator[Advance]:
    """A function to call with batches done and batches in all: a bar on a terminal, some lines elsewhere.

    console: None shows nothing.
    """
    if console is None:
        yield lambda done, total: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("scoring", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield lambda done, total: _line(console, done, total)


def print_results(record: Mapping[str, Any], console: Console) -> None:
    """The results of an evaluation and what they belong to, as a table."""
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    for name, value in {"model": record["model"], "step": record["step"], **record["settings"]}.items():
        table.add_row(Text(_words(name)), Text(_cell(value)), style="dim")
    table.add_section()
    for name, value in record["results"].items():
        table.add_row(Text(_words(name)), Text(_cell(value)))
    # Not as the title of the table, which would break a long name into lines.
    console.print(Text(f"{record['task']}: {record['input']}", style="bold"), soft_wrap=True)
    console.print(table)


def write_results(record: Mapping[str, Any], path: Path) -> None:
    """As JSON, at once; the folder is made where missing."""
    write_json(path, record, allow_nan=False)


def _line(console: Console, done: int, total: int) -> None:
    step = max(1, -(-total // LINES_OF_A_LOG))
    if done % step == 0 or done == total:
        console.print(f"{done:,} of {total:,} batches", soft_wrap=True)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return MISSING if finite(value) is None else f"{value:,.6g}"
    return MISSING if value is None else str(value)
