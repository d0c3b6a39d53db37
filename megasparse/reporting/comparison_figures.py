"""The figures of a comparison: losses over everything that they cost, densities, and the layers of each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from megasparse.reporting.comparison_tables import COSTS, ComparedRun, Cost, curve
from megasparse.reporting.figures import WIDE, FigureOnPage, Key, draw_layers, on_page, plot, plot_dots, value_axis
from megasparse.reporting.run_data import column
from megasparse.reporting.svg import count_axis, loss_axis, new_axes
from megasparse.utils.format import format_flops, format_share

DASHES = (0, (4, 2.5))
UNITS_OF_TIME = ((7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
"""(from this many seconds on, seconds of the unit, its name)."""


Curve = tuple[ComparedRun, np.ndarray, np.ndarray]


def comparison_figures(runs: Sequence[ComparedRun]) -> dict[str, FigureOnPage]:
    """Figures by name; those without data are left out (the page says so)."""
    figures = [*(draw_losses(runs, cost) for cost in COSTS), draw_densities(runs)]
    for number, run in enumerate(runs):
        figures.append(draw_layers(run.data, f"layers-{number}", f"Density of every layer: {run.label}"))
    return {figure.name: figure for figure in figures if figure is not None}


def draw_losses(runs: Sequence[ComparedRun], cost: Cost) -> FigureOnPage | None:
    """Smoothed training loss and validation loss of all runs over one kind of cost."""
    training, validation = (
        _with_points((run, *curve(run.data, loss, cost.key)) for run in runs) for loss in ("loss", "val_loss")
    )
    if not training and not validation:
        return None

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 0.42 * width if width == WIDE else 300)
        for run, x, y in training:
            _line(ax, run, x, y, width)
        for run, x, y in validation:
            plot_dots(ax, x, y, run.role, width, markersize=4.2)
        loss_axis(ax, np.concatenate([y for _, _, y in training + validation]))
        cost_axis(ax, cost, max(x[-1] for _, x, _ in training + validation), width)
        return figure

    drawn = {run.label for run, _, _ in training + validation}
    missing = [run.label for run in runs if run.label not in drawn]
    caption = "Lines: training, smoothed. Dots: validation."
    if missing:
        caption += f" Without {cost.label} in their logs: {', '.join(missing)}."
    return on_page(f"loss-{cost.key}", f"Loss over {cost.label}", caption, _keys(runs, drawn), draw)


def _line(ax: Axes, run: ComparedRun, x: np.ndarray, y: np.ndarray, width: float) -> None:
    plot(ax, x, y, run.role, width, linewidth=1.7, linestyle=DASHES if run.mark == "dashed" else "-")


def draw_densities(runs: Sequence[ComparedRun]) -> FigureOnPage | None:
    """The density of all runs over steps."""
    curves = _with_points((run, *column(run.data.metrics, "density")) for run in runs)
    if not curves:
        return None

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 230 if width == WIDE else 210)
        for run, x, y in curves:
            _line(ax, run, x, y, width)
        value_axis(ax, "density", 1.05, format_share)
        ax.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
        cost_axis(ax, COSTS[0], max(x[-1] for _, x, _ in curves), width)
        return figure

    keys = _keys(runs, {run.label for run, _, _ in curves})
    return on_page("density", "Density over steps", "Share of the sparse weights that are active.", keys, draw)


def _with_points(curves: Iterable[Curve]) -> list[Curve]:
    return [(run, x, y) for run, x, y in curves if len(x)]


def _keys(runs: Sequence[ComparedRun], drawn: set[str]) -> tuple[Key, ...]:
    return tuple(Key(run.role, run.label, run.mark) for run in runs if run.label in drawn)


def cost_axis(ax: Axes, cost: Cost, end: float, width: float) -> None:
    """From nothing spent to the end of the longest run, in units that people read."""
    ticks = 7 if width == WIDE else 4
    ax.set_xlim(0.0, 1.01 * end if end > 0 else 1.0)
    label = cost.label
    if cost.key in ("step", "tokens"):
        count_axis(ax.xaxis, ticks)
    elif cost.key == "seconds":
        unit, name = next((unit, name) for limit, unit, name in UNITS_OF_TIME if end >= limit)
        # Round numbers of the unit, not of seconds.
        marks = MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]).tick_values(0.0, end / unit)
        ax.xaxis.set_major_locator(FixedLocator(marks * unit))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / unit:g}")
        label = f"{label} in {name}"
    else:
        ax.locator_params(axis="x", nbins=ticks - 2)
        ax.xaxis.set_major_formatter(lambda value, _: format_flops(value) if value else "0")
    ax.set_xlabel("step" if cost.key == "step" else label)
