"""The tables of a comparison: what runs cost and reached, what they reach at equal cost, and settings that differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import yaml

from megasparse.config.loader import dotted_values
from megasparse.reporting.figures import PARTS, smooth
from megasparse.reporting.page import outcome, summary_rows
from megasparse.reporting.run_data import RunData, column, lookup
from megasparse.utils.format import (
    MISSING,
    divide,
    finite,
    format_count,
    format_decimal,
    format_flops,
    format_seconds,
    format_share,
)

NOT_SET = "not set"


@dataclass(frozen=True)
class ComparedRun:
    """A run with the name and the looks that it has on the page."""

    data: RunData
    label: str
    role: str
    mark: str
    """Of its lines: `line` or `dashed`."""


class TableRow(NamedTuple):
    """A line of a table: one value for each run."""

    label: str
    values: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Cost:
    """Something that a run spends while its loss falls."""

    key: str
    """In the log."""
    label: str
    words: Callable[[float], str]
    """An amount of it."""


COSTS = (
    Cost("step", "steps", lambda value: f"{value:,.0f} steps"),
    Cost("tokens", "tokens", lambda value: f"{format_count(value)} tokens"),
    Cost("flops_algorithmic", "algorithmic FLOPs", lambda value: f"{format_flops(value)}, algorithmic"),
    Cost("flops_executed", "executed FLOPs", lambda value: f"{format_flops(value)}, executed"),
    Cost("seconds", "training time", lambda value: f"{format_seconds(value)} of training"),
)


def curve(run: RunData, loss: str, cost: str) -> tuple[np.ndarray, np.ndarray]:
    """(cost, loss) where a loss was logged, float64 of equal length; empty where the run did not log that cost.

    loss: `loss` comes smoothed, `val_loss` as it is.
    """
    steps, losses = column(run.metrics, loss)
    losses = smooth(losses) if loss == "loss" else losses
    if cost == "step":
        return steps, losses
    at, spent = column(run.metrics, cost)
    if not len(spent) or not len(steps):
        return np.empty(0), np.empty(0)
    # Beyond what was logged nothing is known.
    known = (steps >= at[0]) & (steps <= at[-1])
    return np.interp(steps[known], at, spent), losses[known]


def ledger_groups(runs: Sequence[ComparedRun]) -> list[tuple[str, list[TableRow]]]:
    """What every run did and cost, as titled groups of rows."""
    summaries = [{row.label: row.value for row in summary_rows(run.data)} for run in runs]

    def summary(label: str, *, named: str | None = None, note: str = "") -> TableRow:
        return TableRow(named or label, tuple(rows[label] for rows in summaries), note)

    def row(label: str, cell: Callable[[RunData], str], note: str = "") -> TableRow:
        return TableRow(label, tuple(cell(run.data) for run in runs), note)

    def flops(kind: str) -> Callable[[RunData], str]:
        def cell(run: RunData) -> str:
            value = run.number(f"flops_{kind}")
            share = f" ({format_share(divide(value, run.number('flops_dense')))})"
            return format_flops(value) + ("" if kind == "dense" or value is None else share)

        return cell

    def seconds(part: str) -> Callable[[RunData], str]:
        def cell(run: RunData) -> str:
            value = finite(lookup(run.summary, "seconds_by_part", part))
            return format_seconds(run.latest(f"seconds_{part}") if value is None else value)

        return cell

    reached = [
        *map(summary, ("Steps", "Tokens", "Parameters", "Validation loss", "Best validation loss")),
        summary("Training loss", note="last logged"),
        row("Mean density", lambda run: format_share(outcome(run)["mean_density"])),
        summary("Final density"),
    ]
    work = [
        row("Dense-equivalent", flops("dense"), "had every weight been active; not executed"),
        row("Algorithmic", flops("algorithmic"), "active weights and attended pairs; share of dense"),
        row("Executed", flops("executed"), "what the kernels multiplied; share of dense"),
    ]
    time = [
        summary("Training time", named="Training"),
        *(row(part, seconds(part)) for part in (*PARTS, "other")),
        summary("Tokens per second"),
        summary("Hardware"),
    ]
    return [("Outcome", reached), ("FLOPs", work), ("Time", time)]


def budget_rows(runs: Sequence[ComparedRun]) -> list[TableRow]:
    """The loss of every run at the largest cost that all runs have reached, for each kind of cost.

    Validation loss where every run has one, else smoothed training loss; between logged points on a straight line.
    """
    data = [run.data for run in runs]
    loss = "val_loss" if all(len(column(run.metrics, "val_loss")[0]) for run in data) else "loss"
    rows = []
    for cost in COSTS:
        curves = [curve(run, loss, cost.key) for run in data]
        if not all(len(x) for x, _ in curves):
            continue
        budget = min(x[-1] for x, _ in curves)
        # A run that logged its first loss later than that cannot be compared there.
        values = [format_decimal(np.interp(budget, x, y).item()) if budget >= x[0] else MISSING for x, y in curves]
        words = "validation loss" if loss == "val_loss" else "smoothed training loss"
        rows.append(TableRow(cost.words(budget), tuple(values), words))
    return rows


def setting_rows(runs: Sequence[ComparedRun]) -> list[TableRow] | None:
    """Settings that are not the same in all runs, by dotted name; None where there are fewer than two to compare."""
    configurations = [_settings(run.data.config) for run in runs]
    known = [settings for settings in configurations if settings is not None]
    if len(known) < 2:
        return None
    return [
        TableRow(name, tuple(MISSING if one is None else one.get(name, NOT_SET) for one in configurations))
        for name in dict.fromkeys(name for settings in known for name in settings)
        if len({settings.get(name, NOT_SET) for settings in known}) > 1
    ]


def _settings(text: str | None) -> dict[str, str] | None:
    """The values of a configuration as text, by dotted name; None where it is missing or no YAML mapping."""
    try:
        tree = yaml.safe_load(text) if text is not None else None
    except (yaml.YAMLError, RecursionError):
        return None
    return dict(dotted_values(tree)) if isinstance(tree, Mapping) else None
