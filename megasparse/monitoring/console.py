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
from collections.abc import Iterable, Mapping
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
    finite,
    format_bytes,
    format_count,
    format_decimal,
    format_factor,
    format_flops,
    format_integer,
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
            self._line(
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
        self._line(text)

    def warning(self, text: str) -> None:
        """Print a line that begins with `warning:`."""
        self._line(f"warning: {text}", style="yellow")

    def _line(self, text: str, style: str = "") -> None:
        self.console.print(Text(_printable(text), style=style), soft_wrap=True)

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
        return None

    def message(self, text: str) -> None:
        return None

    def warning(self, text: str) -> None:
        return None


def quiet() -> QuietProgress:
    """The progress of ranks other than 0."""
    return QuietProgress()


def print_plan(plan: Mapping[str, Any], console: Console) -> None:
    """Print the derived numbers of a run, with units, before it starts."""
    parameters, tokens, schedule, flops = (_part(plan, key) for key in ("parameters", "tokens", "schedule", "flops"))
    memory, parallel, kernels = (_part(plan, key) for key in ("memory", "parallel", "kernels"))
    phases = _phases(schedule)
    rows = [
        (
            "Model",
            f"{format_count(parameters.get('total'))} parameters, {format_count(parameters.get('sparsifiable'))} of "
            f"them sparsifiable; {format_count(parameters.get('active_at_min_density'))} active at the lowest density",
        ),
        (
            "Training",
            f"{format_integer(plan.get('steps'))} steps of {format_integer(tokens.get('per_step'))} tokens, "
            f"{format_count(tokens.get('total'))} tokens in all",
        ),
        ("Documents", _words(plan.get("documents") or "")),
        ("Phases", "\n".join(f"{format_phase(name)}: steps {start:,} to {end:,}" for name, start, end in phases)),
        (
            "Density",
            f"{sparkline(density_curve(schedule), blocks=_unicode(console))}\n"
            f"mean {format_share(schedule.get('mean_density'))}, lowest {format_share(schedule.get('min_density'))}",
        ),
        (
            "FLOPs",
            f"{format_flops(flops.get('algorithmic'))} of {format_flops(flops.get('dense'))} dense: "
            f"{format_share(flops.get('ratio'))}, {format_factor(divide(flops.get('dense'), flops.get('algorithmic')))}"
            " fewer",
        ),
        ("Memory per rank", _memory(memory)),
        ("Sent per rank", _communication(_part(plan, "communication"))),
        ("Parallel", _parallel(parallel)),
        ("Kernels", _kernels(kernels)),
        ("Methods", "\n".join(plan.get("methods") or [])),
    ]
    _print_table(f"Plan of {plan.get('run', 'the run')}", rows, console)
    print_warnings(plan.get("warnings") or [], console)


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    for warning in warnings:
        console.print(Text(_printable(f"warning: {warning}"), style="yellow"), soft_wrap=True)


def print_summary(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the final numbers of a run."""
    dense, algorithmic, executed = (summary.get(f"flops_{kind}") for kind in ("dense", "algorithmic", "executed"))
    seconds = summary.get("seconds")
    parts = _part(summary, "seconds_by_part")
    finished, reason = summary.get("finished") is True, summary.get("reason")
    best = finite(summary.get("best_val_loss"))
    rows = [
        (
            "Outcome",
            f"{'finished' if finished else 'stopped early'} after {format_integer(summary.get('steps'))} steps"
            + (f": {reason}" if reason and not finished else ""),
        ),
        (
            "Loss",
            f"validation {format_decimal(summary.get('val_loss'), 4)}"
            + (f" (best {format_decimal(best, 4)})" if best is not None else "")
            + f", training {format_decimal(summary.get('loss'), 4)}",
        ),
        ("Final density", format_share(summary.get("final_density"))),
        (
            "FLOPs",
            f"dense-equivalent {format_flops(dense)}\n"
            f"algorithmic {format_flops(algorithmic)}, {format_share(divide(algorithmic, dense))} of dense\n"
            f"executed {format_flops(executed)}, {format_share(divide(executed, dense))} of dense",
        ),
        (
            "Time",
            f"{format_seconds(seconds)} for {format_count(summary.get('tokens'))} tokens, "
            f"{format_count(divide(summary.get('tokens'), seconds))} tokens/s",
        ),
        ("Time by part", ", ".join(f"{name} {format_seconds(value)}" for name, value in parts.items())),
        ("Hardware", _words(summary.get("hardware") or "")),
    ]
    _print_table(f"Summary of {summary.get('run', 'the run')}", rows, console or make_console())


def density_curve(schedule: Mapping[str, Any], points: int = 60) -> list[float]:
    """Density at `points` evenly spaced moments of the run, from the plan's schedule.

    `schedule["curve"]`, a list of evenly spaced densities, is used where the plan has one; otherwise the phases are
    joined by straight lines, which leaves out the shape of a fall or rise.
    """
    curve = schedule.get("curve")
    known = [value for value in map(finite, curve) if value is not None] if isinstance(curve, list) else []
    if known:
        return [known[round(i * (len(known) - 1) / max(1, points - 1))] for i in range(points)]
    phases = _phases(schedule)
    lowest = finite(schedule.get("min_density"))
    if not phases or lowest is None:
        return []
    end = max(last for _, _, last in phases)
    return [_density_at((i + 0.5) / points * end, phases, lowest) for i in range(points)]


def sparkline(values: Iterable[float], *, blocks: bool = True) -> str:
    """A row of characters whose height is the value, from 0 to 1; plain ASCII where `blocks` is false."""
    ramp = _BLOCKS if blocks else _LETTERS
    return "".join(ramp[min(len(ramp) - 1, max(0, int(len(ramp) * value)))] for value in values)


def _density_at(step: float, phases: list[tuple[str, int, int]], lowest: float) -> float:
    for name, start, end in phases:
        if start <= step < end:
            inside = (step - start) / (end - start)
            falling, rising = 1.0 - (1.0 - lowest) * inside, lowest + (1.0 - lowest) * inside
            return {"warm_up": falling, "ultra_sparse": lowest, "restoration": rising}.get(name, 1.0)
    return 1.0


def _phases(schedule: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """(name, first step, end) of the phases that last at least a step."""
    phases: list[tuple[str, int, int]] = []
    for phase in schedule.get("phases") or []:
        name, start, end = str(phase["name"]), int(phase["start_step"]), int(phase["end_step"])
        if phases and phases[-1][0] == name and phases[-1][2] == start:
            # The plan cuts a phase where the attention pattern changes; here it is one.
            start = phases.pop()[1]
        if end > start:
            phases.append((name, start, end))
    return phases


def _memory(memory: Mapping[str, Any]) -> str:
    parts = ", ".join(f"{name} {format_bytes(value)}" for name, value in memory.items() if name != "total")
    return f"{format_bytes(memory.get('total'))}: {parts}" if parts else ""


def _communication(sent: Mapping[str, Any]) -> str:
    if not sent:
        return ""
    data, tensor, topology = (format_bytes(sent[k]) for k in ("data_parallel", "tensor_parallel", "topology_step"))
    return f"{data} data-parallel and {tensor} tensor-parallel a step; up to {topology} a topology update"


def _parallel(parallel: Mapping[str, Any]) -> str:
    count = {name: format_integer(value) for name, value in parallel.items()}
    if not count:
        return ""
    return (
        f"{count.get('world_size')} {'rank' if count.get('world_size') == '1' else 'ranks'}: "
        f"{count.get('data_parallel_size')} data x {count.get('tensor_parallel_size')} tensor, "
        f"ZeRO stage {count.get('zero_stage')}; micro-batch {count.get('micro_batch_size')} x "
        f"{count.get('accumulation_steps')} accumulation steps"
    )


def _kernels(kernels: Mapping[str, Any]) -> str:
    """A line per kind of sparse layer, and one for each other choice."""
    lines = []
    for name, value in kernels.items():
        if name == "block_sparse" and isinstance(value, list):
            lines += [describe_kernel(row) for row in value] or ["no sparse layers"]
        else:
            lines.append(f"{str(name).replace('_', ' ')}: {_words(value)}")
    return "\n".join(lines)


def _print_table(title: str, rows: list[tuple[str, str]], console: Console) -> None:
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        if value:
            table.add_row(label, Text(_printable(value)))
    console.print(Text(_printable(title), style="bold cyan"))
    console.print(table)


def _part(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = tree.get(key)
    return value if isinstance(value, Mapping) else {}


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(entry)}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value))
    return str(value)


def _unicode(console: Console) -> bool:
    return "utf" in console.encoding.lower()


def _printable(text: str) -> str:
    """`text` without control characters, which a message could bring along from a file name or an error."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(text))
