"""What a pruning shows: a bar on a terminal, a line per block elsewhere, a table at the end."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megasparse.pruning.budget import LayerUnits
from megasparse.pruning.work_folder import LayerRecord

Advance = Callable[[str, int], None]
"""Takes what is being done, and how much of it has been done since the last call."""


@contextlib.contextmanager
def showing_progress(console: Console | None, total: int) -> Iterator[Advance]:
    """console: None shows nothing. total: of what is advanced by."""
    if console is None or not console.is_terminal:
        yield lambda what, done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what, done: bar.update(task, description=what, advance=done)


def print_block(console: Console | None, block: int, blocks: int, layers: Mapping[str, LayerRecord]) -> None:
    """A line for a block that is done."""
    if console is None:
        return
    errors = [layer.error for layer in layers.values() if not math.isnan(layer.error)]
    text = f", relative output error {min(errors):.4f} to {max(errors):.4f}" if errors else ""
    console.print(f"block {block + 1} of {blocks}: {len(layers)} layers pruned{text}", soft_wrap=True)


def print_layers(console: Console | None, units: list[LayerUnits], layers: Mapping[str, LayerRecord]) -> None:
    """Density and error of every layer."""
    if console is None:
        return
    table = Table("layer", "density", "relative output error")
    for layer in units:
        pruned = layers[layer.name]
        error = "" if math.isnan(pruned.error) else f"{pruned.error:.5f}"
        table.add_row(layer.name, f"{pruned.num_active / layer.units:.4f}", error)
    console.print(table)
    active, whole = sum(layer.num_active for layer in layers.values()), sum(layer.units for layer in units)
    console.print(f"active units: {active:,} of {whole:,} ({active / whole:.4f})", soft_wrap=True)
