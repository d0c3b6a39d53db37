"""What rank 0 shows: a progress bar, a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import Progress

from megasparse.monitoring.console import print_facts
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

        def line(done: int, total: int) -> None:
            if done % max(1, -(-total // LINES_OF_A_LOG)) == 0 or done == total:
                console.print(f"{done:,} of {total:,} batches", soft_wrap=True)

        yield line


def print_results(record: Mapping[str, Any], console: Console) -> None:
    """The results of an evaluation and what they belong to, as a table."""
    values = {"model": record["model"], "step": record["step"], **record["settings"], **record["results"]}
    rows = {name.replace("_", " "): _cell(value) for name, value in values.items()}
    print_facts(f"{record['task']}: {record['input']}", rows, console)


def _cell(value: Any) -> str:
    if isinstance(value, bool | str):
        return str(value)
    return MISSING if finite(value) is None else f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
