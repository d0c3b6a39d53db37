"""The page of a study, one HTML file that loads nothing: tables, and validation loss over FLOPs and over seconds.

write_page(results, folder / "study.html")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from megasparse.reporting.comparison_figures import DASHES, cost_axis
from megasparse.reporting.comparison_tables import COSTS, Cost
from megasparse.reporting.figures import WIDE, FigureOnPage, Key, on_page, plot, plot_dots
from megasparse.reporting.page import fill_in
from megasparse.reporting.svg import loss_axis, new_axes
from megasparse.studies.tables import arm_rows, difference_rows, sweep_rows
from megasparse.utils.files import write_at_once

COLOURS = 8


def write_page(results: Mapping[str, Any], path: Path) -> None:
    drawn = [draw_losses(results, cost) for cost in COSTS if cost.key in ("flops_algorithmic", "seconds")]
    tables = {
        "Arms": (arm_rows(results), "Final validation loss: mean and standard deviation over the seeds."),
        "Paired differences": (
            difference_rows(results),
            "Of runs of the same seed, which share initial weights and order of data. Intervals: Student t over the "
            "pairs. Negative: the arm is better than the baseline.",
        ),
        "Paired differences of the task accuracy": (
            difference_rows(results, "accuracy_differences"),
            "Of the same pairs. Positive: the arm is better.",
        ),
        "Learning rates": (sweep_rows(results), "Tried on a seed of their own; the best was used for all others."),
    }
    page = fill_in(
        "study.html",
        results=results,
        tables={title: table for title, table in tables.items() if table[0]},
        figures={figure.name: figure for figure in drawn if figure is not None},
    )
    write_at_once(path, page)


def draw_losses(results: Mapping[str, Any], cost: Cost) -> FigureOnPage | None:
    """A line through the mean of an arm's runs, and a dot where each of them ended."""
    arms = [(number, arm) for number, arm in enumerate(results["arms"]) if arm["runs"]]
    curves = [(number, *_mean_curve(arm, cost)) for number, arm in arms]
    if not all(len(x) for _, x, _ in curves) or not curves:
        return None

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 0.42 * width if width == WIDE else 300)
        for number, x, y in curves:
            style = DASHES if _mark(number) == "dashed" else "-"
            plot(ax, x, y, _role(number), width, linewidth=1.7, linestyle=style)
        for number, arm in arms:
            ends = np.array([(run["curve"][cost.key][-1], run["val_loss"]) for run in arm["runs"]])
            plot_dots(ax, ends[:, 0], ends[:, 1], _role(number), width, markersize=4.2)
        loss_axis(ax, np.concatenate([y for _, _, y in curves]))
        cost_axis(ax, cost, max(run["curve"][cost.key][-1] for _, arm in arms for run in arm["runs"]), width)
        return figure

    keys = tuple(Key(_role(number), arm["arm"], _mark(number)) for number, arm in arms)
    caption = "Lines: means over the seeds. Dots: where each run ended."
    return on_page(f"loss-{cost.key}", f"Validation loss over {cost.label}", caption, keys, draw)


def _mean_curve(arm: Mapping[str, Any], cost: Cost) -> tuple[np.ndarray, np.ndarray]:
    """(cost, loss) at the validations that all runs of the arm have."""
    curves = [run["curve"] for run in arm["runs"]]
    steps = set.intersection(*(set(curve["step"]) for curve in curves))
    found = [
        np.array([(curve[cost.key][n], curve["val_loss"][n]) for n, step in enumerate(curve["step"]) if step in steps])
        for curve in curves
    ]
    mean = np.mean(found, axis=0).reshape(-1, 2)
    return mean[:, 0], mean[:, 1]


def _role(number: int) -> str:
    return f"run_{number % COLOURS + 1}"


def _mark(number: int) -> str:
    return "line" if number // COLOURS % 2 == 0 else "dashed"
