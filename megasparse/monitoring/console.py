"""What rank 0 shows: the plan before the first step, progress while training, the summary at the end.

On a terminal there is one live bar; elsewhere (a log file, a pipe, a batch job) each update is one plain line without
control codes. Other ranks hold the silent twin, so that no caller asks for its rank::

    console = make_console()
    print_plan(plan, console)
    with Progress(steps, console=console) if mesh.rank == 0 else quiet() as progress:
        progress.update(step, loss=..., density=..., phase=..., pattern=..., tokens_per_s=...)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from megasparse.utils.format import (
    MISSING,
    describe_kernel,
    divide,
    format_bytes,
    format_count,
    format_decimal,
    format_factor,
    format_flops,
    format_phase,
    format_seconds,
    format_share,
)

REFRESH_SECONDS = 0.1
"""The live bar is drawn at most this often; it has no thread of its own that would take time from training."""

WIDE_TERMINAL = 130
"""Columns from which the live bar is shown with all its words; eighty columns still hold the numbers."""

LOG_WIDTH = 110
"""Columns of a table that goes to a file."""

_BLOCKS = "▁▂▃▄▅▆▇█"
_LETTERS = ".:-=+*#@"


def make_console() -> Console:
    """A console on standard output that writes control codes to a terminal only, whatever the environment asks for."""
    terminal = sys.stdout.isatty()
    return Console(force_terminal=terminal, width=None if terminal else LOG_WIDTH, highlight=False)


class Progress:
    """Progress of a run of `steps` optimizer steps; `start_step` steps were done before (a resumed run)."""

    def __init__(self, steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        assert 0 <= start_step <= steps, f"start_step {start_step} is outside 0 .. {steps}"
        self.steps = steps
        self.start_step = start_step
        self.console = console or make_console()
        self._started = time.monotonic()
        self._drawn = 0.0
        self._bar = self._make_bar() if self.console.is_terminal and not self.console.is_dumb_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=steps, completed=start_step, numbers="", left="")

    def __enter__(self) -> Progress:
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        loss: float,
        density: float,
        phase: str,
        pattern: str,
        tokens_per_s: float,
        val_loss: float | None = None,
    ) -> None:
        """Show that `step` steps are done. `loss` and `val_loss` in nats per token, `density` as a fraction."""
        left = self._time_left(step)
        losses = f"loss {format_decimal(loss, 4)}"
        state = f"density {format_share(density)}  {format_phase(phase)}"
        rate = format_count(tokens_per_s)
        if self._bar is None:
            if val_loss is not None:
                losses += f"  validation {format_decimal(val_loss, 4)}"
            width = len(f"{self.steps:,}")
            self.message(
                f"step {step:>{width},} of {self.steps:,}  {losses}  {state}  attention {pattern}  {rate} tokens/s  "
                f"{left} left"
            )
            return
        if val_loss is not None:
            # A bar forgets; validations are few and are kept above it.
            self.message(f"step {step:,}: validation loss {format_decimal(val_loss, 4)}")
        if self.console.width >= WIDE_TERMINAL:
            numbers = f"{losses}  {state}  attention {pattern}  {rate} tokens/s"
        else:
            numbers = f"{losses} {format_share(density)} {format_phase(phase)} {rate} tok/s"
        self._bar.update(self._task, completed=step, numbers=escape(numbers), left=left)
        now = time.monotonic()
        if now - self._drawn >= REFRESH_SECONDS or step >= self.steps:
            self._drawn = now
            self._bar.refresh()

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self.console.print(Text(_printable(text)), soft_wrap=True)

    def _time_left(self, step: int) -> str:
        done = step - self.start_step
        if done <= 0:
            return MISSING
        return format_seconds(max(0, self.steps - step) * (time.monotonic() - self._started) / done)

    def _make_bar(self) -> Bar:
        wide = self.console.width >= WIDE_TERMINAL
        columns = (
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            *((BarColumn(bar_width=20), TaskProgressColumn()) if wide else (BarColumn(bar_width=4),)),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("[cyan]{task.fields[left]} left"),
        )
        return Bar(*columns, console=self.console, auto_refresh=False)


class QuietProgress:
    """Has the methods of `Progress` and shows nothing."""

    def __enter__(self) -> QuietProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def update(self, step: int, **values: Any) -> None:
        return None

    def message(self, text: str) -> None:
        return None


def quiet() -> QuietProgress:
    """The progress of ranks other than 0."""
    return QuietProgress()


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print the derived numbers of a run, with units, before it starts."""
    parameters, tokens, schedule, flops = (plan[key] for key in ("parameters", "tokens", "schedule", "flops"))
    memory, count, kernels = dict(plan["memory"]), plan["parallel"], plan["kernels"]
    sent = {name: format_bytes(value) for name, value in plan["communication"].items()}
    total = format_bytes(memory.pop("total"))
    layers = [describe_kernel(row) for row in kernels["block_sparse"]] or ["no sparse layers"]
    rows = {
        "Model": f"{format_count(parameters['total'])} parameters, {format_count(parameters['sparsifiable'])} of them "
        f"sparsifiable; {format_count(parameters['active_at_min_density'])} active at the lowest density",
        "Training": f"{plan['steps']:,} steps of {tokens['per_step']:,} tokens, {format_count(tokens['total'])} tokens "
        "in all",
        "Documents": plan["documents"],
        "Phases": _phases(schedule["phases"]),
        "Density": f"{sparkline(schedule['curve'], blocks='utf' in console.encoding.lower())}\n"
        f"mean {format_share(schedule['mean_density'])}, lowest {format_share(schedule['min_density'])}",
        "FLOPs": f"{format_flops(flops['algorithmic'])} of {format_flops(flops['dense'])} dense: "
        f"{format_share(flops['ratio'])}, {format_factor(divide(flops['dense'], flops['algorithmic']))} fewer",
        "Memory per rank": f"{total}: " + ", ".join(f"{name} {format_bytes(part)}" for name, part in memory.items()),
        "Sent per rank": f"{sent['data_parallel']} data-parallel and {sent['tensor_parallel']} tensor-parallel a step; "
        f"up to {sent['topology_step']} a topology update{_sent_over_the_run(plan)}",
        "Parallel": f"{count['world_size']:,} {'rank' if count['world_size'] == 1 else 'ranks'}: "
        f"{count['data_parallel_size']:,} data x {count['tensor_parallel_size']:,} tensor, ZeRO stage "
        f"{count['zero_stage']}; micro-batch {count['micro_batch_size']:,} x {count['accumulation_steps']:,} "
        f"accumulation steps{_micro_batches(plan)}",
        "Kernels": "\n".join(
            [
                f"device: {kernels['device']}",
                *layers,
                f"dense products: {_by_kernel(kernels['dense'])}",
                f"hybrid attention: {kernels['hybrid_attention']}",
                f"activations, norms, rotary positions: {kernels['elementwise']}",
                f"optimizer: {kernels['optimizer']}",
                f"cross entropy: {kernels['loss']}",
            ]
        ),
        "Methods": "\n".join(plan.get("methods", [])),
    }
    print_facts(f"Plan of {plan['run']}", rows, console)
    print_warnings(plan["warnings"], console)


def _sent_over_the_run(plan: Mapping[str, Any]) -> str:
    """Bytes by kind, where the plan has them."""
    if "bytes" not in plan or not plan["bytes"]["total"]["sent"]:
        return ""
    total = plan["bytes"]["total"]
    kinds = {
        "reduced": "gradients",
        "gathered": "weights",
        "tensor_parallel": "tensor-parallel",
        "topology": "topology",
    }
    parts = [f"{name} {format_bytes(total[kind])}" for kind, name in kinds.items() if total[kind]]
    return f"; {format_bytes(total['sent'])} over the run: {', '.join(parts)}"


def _micro_batches(plan: Mapping[str, Any]) -> str:
    """Those of the phases, where they differ."""
    rows = plan.get("bytes", {}).get("phases", [])
    sizes = {row["phase"]: row["micro_batch_size"] for row in rows}
    if len(set(sizes.values())) < 2:
        return ""
    return "; micro-batch by phase: " + ", ".join(f"{format_phase(name)} {size:,}" for name, size in sizes.items())


def _by_kernel(rows: Iterable[Mapping[str, Any]]) -> str:
    """`torch`, or `onednn (mlp.up, head), torch (mlp.down)`."""
    layers: dict[str, dict[str, None]] = {}
    for row in rows:
        layers.setdefault(row["kernel"], {})[row["layer"]] = None
    if len(layers) == 1:
        return next(iter(layers))
    return ", ".join(f"{kernel} ({', '.join(names)})" for kernel, names in layers.items())


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text(_printable(f"warning: {warning}"), style="yellow"), soft_wrap=True)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the final numbers of a run."""
    dense, algorithmic, executed = (summary[f"flops_{kind}"] for kind in ("dense", "algorithmic", "executed"))
    tokens, seconds, best = summary["tokens"], summary["seconds"], summary["best_val_loss"]
    end = "finished" if summary["finished"] else "stopped early"
    reason = f": {summary['reason']}" if summary["reason"] and not summary["finished"] else ""
    best_words = f" (best {format_decimal(best, 4)})" if best is not None else ""
    parts = summary["seconds_by_part"].items()
    rows = {
        "Outcome": f"{end} after {summary['steps']:,} steps{reason}",
        "Skipped steps": f"{skipped:,}, for their gradients" if (skipped := summary.get("skipped_steps")) else "",
        "Loss": f"validation {format_decimal(summary['val_loss'], 4)}{best_words}, "
        f"training {format_decimal(summary['loss'], 4)}",
        "Final density": format_share(summary["final_density"]),
        "FLOPs": f"dense-equivalent {format_flops(dense)}\n"
        f"algorithmic {format_flops(algorithmic)}, {format_share(divide(algorithmic, dense))} of dense\n"
        f"executed {format_flops(executed)}, {format_share(divide(executed, dense))} of dense",
        "Time": f"{format_seconds(seconds)} for {format_count(tokens)} tokens, "
        f"{format_count(divide(tokens, seconds))} tokens/s",
        "Time by part": ", ".join(f"{name} {format_seconds(value)}" for name, value in parts),
        "Hardware": summary["hardware"],
    }
    print_facts(f"Summary of {summary['run']}", rows, console or make_console())


def sparkline(values: Iterable[float], *, blocks: bool = True) -> str:
    """A row of characters whose height is the value, from 0 to 1; plain ASCII where `blocks` is false."""
    ramp = _BLOCKS if blocks else _LETTERS
    return "".join(ramp[min(len(ramp) - 1, max(0, int(len(ramp) * value)))] for value in values)


def _phases(phases: Sequence[Mapping[str, Any]]) -> str:
    """A line for each; the plan cuts a phase where the attention pattern changes, here it is one."""
    groups = [(name, list(group)) for name, group in groupby(phases, key=lambda phase: phase["name"])]
    spans = [f"{format_phase(name)}: steps {p[0]['start_step']:,} to {p[-1]['end_step']:,}" for name, p in groups]
    return "\n".join(spans)


def print_facts(title: str, rows: Mapping[str, str], console: Console) -> None:
    """A title and labelled values below it; what has no value is left out."""
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows.items():
        if value:
            table.add_row(label, Text(_printable(value)))
    # Not as the title of the table, which would break a long name into lines.
    console.print(Text(_printable(title), style="bold cyan"), soft_wrap=True)
    console.print(table)


def print_table(rows: Sequence[Mapping[str, str]], console: Console, title: str | None = None) -> None:
    """rows: heading -> value; a value that a row lacks is empty."""
    table = Table(title=title and escape(title), title_justify="left")
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    for number, heading in enumerate(headings):
        words = " ".join(row.get(heading, "") for row in rows).split()
        # What a row is named by keeps its words whole where columns must be narrow.
        narrowest = max(map(len, words), default=1) if number == 0 else None
        table.add_column(heading, overflow="fold", min_width=narrowest and min(narrowest, 20))
    for row in rows:
        table.add_row(*(escape(row.get(heading, "")) for heading in headings))
    console.print(table)


def _printable(text: str) -> str:
    """`text` without control characters, which a message could bring along from a file name or an error."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(text))
