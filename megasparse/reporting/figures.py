"""The figures of the report.

``all_figures(run)`` draws what the run's logs allow. Each figure exists twice, for wide pages and for phones, because
one drawing scaled to both would have unreadable labels on one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from megasparse.reporting.run_data import RunData, column, natural_order
from megasparse.reporting.svg import (
    colour,
    count_axis,
    logarithmic,
    loss_axis,
    new_axes,
    short_count,
    thin_out,
    tint_map,
    to_svg,
)
from megasparse.utils.format import finite, format_decimal, format_flops, format_phase, format_share

WIDE, NARROW = 880, 350
"""Page pixels of the two drawings."""

MAX_POINTS = 900
"""Points of a curve that are drawn on a wide page; more cannot be seen."""

PARTS = ("data", "forward", "backward", "optimizer", "topology")
"""Parts of a training step whose seconds are logged."""

SMOOTHING_SHARE = 0.015
"""Logged points on either side that a smoothed value averages, as a share of all."""

_PHASE_OPACITY = {"warm_up": 0.10, "ultra_sparse": 0.17, "restoration": 0.10}


@dataclass(frozen=True)
class Key:
    """An entry of a legend: role of the colour, label, and how the mark looks.

    Marks are `line`, `faint`, `dashed`, `dot`, `area` and `ramp`.
    """

    role: str
    label: str
    mark: str = "line"


@dataclass(frozen=True)
class FigureOnPage:
    """A figure with its words; `wide` and `narrow` are SVG elements, built from escaped parts."""

    name: str
    title: str
    caption: str
    keys: tuple[Key, ...]
    wide: Markup
    narrow: Markup


def all_figures(run: RunData) -> dict[str, FigureOnPage]:
    """Figures by name; those without data are left out (the page says so)."""
    drawn = (draw_losses, draw_loss_by_flops, draw_throughput, draw_step_time, draw_layers, draw_churn, draw_optimizer)
    figures = (figure(run) for figure in drawn)
    return {figure.name: figure for figure in figures if figure is not None}


def draw_losses(run: RunData) -> FigureOnPage | None:
    """Training loss, raw and smoothed, and validation loss; the density below, on the same steps."""
    steps, losses = column(run.metrics, "loss")
    valid_steps, valid_losses = column(run.metrics, "val_loss")
    if not len(steps) and not len(valid_steps):
        return None
    density = column(run.metrics, "density")

    def draw(width: float) -> Figure:
        figure, (top, bottom) = new_axes(width, 0.5 * width if width == WIDE else 400, panels=(3.2, 1.0))
        plot(top, steps, losses, "loss", width, alpha=0.3, linewidth=0.9)
        plot(top, steps, smooth(losses), "loss", width, linewidth=1.8)
        plot_dots(top, valid_steps, valid_losses, "validation", width, linestyle="-", linewidth=1.4, markersize=3.6)
        if len(valid_steps):
            last = (valid_steps[-1], valid_losses[-1])
            looks = {"ha": "right", "fontsize": 12, "fontweight": "bold", "color": colour("validation")}
            top.annotate(format_decimal(last[1]), last, xytext=(-2, 9), textcoords="offset points", **looks)
        loss_axis(top, np.concatenate([losses, valid_losses]))
        bottom.fill_between(*_thinned(*density, width), color=colour("density"), alpha=0.22, linewidth=0)
        plot(bottom, *density, "density", width)
        value_axis(bottom, "density", 1.04, format_share)
        bottom.set_yticks([0.0, 0.5, 1.0])
        finish_steps(run, [top, bottom], name_phases=True)
        return figure

    keys = (
        Key("loss", "training, each logged step", "faint"),
        Key("loss", "training, smoothed"),
        Key("validation", "validation", "dot"),
        Key("density", "density of the sparse weights", "area"),
    )
    return on_page("losses", "Loss over steps", "Shaded: phases in which weights are missing.", keys, draw)


def draw_loss_by_flops(run: RunData) -> FigureOnPage | None:
    """The same losses over the FLOPs that the method needs, and over those that a dense run would have needed."""
    logged, spent = column(run.metrics, "flops_algorithmic")
    dense_steps, dense_spent = column(run.metrics, "flops_dense")
    steps, losses = column(run.metrics, "loss")
    valid_steps, valid_losses = column(run.metrics, "val_loss")
    if len(spent) < 2 or len(losses) < 2:
        return None
    dense_total = run.number("flops_dense") or run.latest("flops_dense")

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 0.4 * width if width == WIDE else 300)
        smoothed = smooth(losses)
        if len(dense_spent) > 1:
            x = np.interp(steps, dense_steps, dense_spent)
            plot(ax, x, smoothed, "dense", width, linewidth=1.4, linestyle=(0, (4, 3)))
        plot(ax, np.interp(steps, logged, spent), smoothed, "loss", width, linewidth=1.8)
        plot_dots(ax, np.interp(valid_steps, logged, spent), valid_losses, "validation", width)
        loss_axis(ax, np.concatenate([smoothed, valid_losses]))
        _mark_end(ax, spent[-1], f"needed: {format_flops(spent[-1])}", "loss", dense_total)
        if dense_total is not None:
            _mark_end(ax, dense_total, f"dense-equivalent: {format_flops(dense_total)}", "dense", dense_total)
        ax.set_xlim(0.0, 1.02 * max(spent[-1], dense_total or 0.0))
        ax.xaxis.set_major_formatter(lambda value, _: format_flops(value) if value else "0")
        ax.locator_params(axis="x", nbins=6 if width == WIDE else 3)
        ax.set_xlabel("cumulative training FLOPs")
        return figure

    keys = (
        Key("loss", "smoothed training loss over algorithmic FLOPs"),
        Key("dense", "the same loss, had every step been dense", "dashed"),
        Key("validation", "validation over algorithmic FLOPs", "dot"),
    )
    caption = (
        "The horizontal distance between the two curves is what sparsity saved. "
        "The dashed curve is no dense run: a dense model would reach another loss."
    )
    return on_page("flops", "Loss over FLOPs", caption, keys, draw)


def draw_throughput(run: RunData) -> FigureOnPage | None:
    """Tokens per second over steps."""
    steps, rates = column(run.metrics, "tokens_per_s")
    if not len(steps):
        return None

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 230 if width == WIDE else 210)
        plot(ax, steps, rates, "loss", width, linewidth=1.5)
        # One slow first step must not hide the rest, one fast outlier must be seen.
        value_axis(ax, "tokens / s", 1.08 * max(rates.max(), 1e-9), short_count)
        finish_steps(run, [ax])
        return figure

    return on_page("throughput", "Speed over steps", "Over all ranks, as logged.", (), draw)


def draw_step_time(run: RunData) -> FigureOnPage | None:
    """Milliseconds of a step by part, stacked, from differences of the cumulative seconds."""
    names = [f"seconds_{part}" for part in PARTS]
    records = [record for record in run.metrics if all(finite(record.get(name)) is not None for name in names)]
    if len(records) < 3:
        return None
    logged = np.array([[record[name] for name in ("step", *names)] for record in records], dtype=np.float64)
    changes = np.diff(logged, axis=0)
    lengths, milliseconds = changes[:, 0], 1e3 * changes[:, 1:] / changes[:, :1]
    # A resumed run may restart its clocks; such a difference says nothing about a step.
    kept = (milliseconds >= 0.0).all(axis=1)
    if kept.sum() < 2:
        return None
    steps, milliseconds = _average_stretches(logged[1:, 0][kept], milliseconds[kept], lengths[kept], 160)

    def draw(width: float) -> Figure:
        figure, (ax,) = new_axes(width, 260 if width == WIDE else 230)
        ax.stackplot(steps, milliseconds.T, colors=[colour(part) for part in PARTS], linewidth=0, alpha=0.85)
        ax.set_ylim(0.0, 1.05 * max(milliseconds.sum(axis=1).max(), 1e-9))
        ax.set_ylabel("ms per step")
        ax.locator_params(axis="y", nbins=5)
        finish_steps(run, [ax])
        return figure

    keys = tuple(Key(part, part, "area") for part in PARTS)
    caption = "Where FLOPs saved became seconds saved, the pile is lower in the sparse phases."
    return on_page("step_time", "Time of a step by part", caption, keys, draw)


def draw_layers(run: RunData, name: str = "layers", title: str = "Density of every layer") -> FigureOnPage | None:
    """Density of every layer at every topology update, as a picture; `name` is unique on the page."""
    records = [record for record in run.topology if isinstance(record.get("densities"), dict)]
    layers = sorted({name for record in records for name in record["densities"]}, key=natural_order)
    if not layers:
        return None
    # More columns than this are narrower than a pixel.
    chosen = [records[i] for i in spread(len(records), 240)]
    rows = [[finite(record["densities"].get(name)) for record in chosen] for name in layers]
    densities = np.array(rows, dtype=np.float64)
    labels = short_layer_names(layers)
    floor = min(0.5, max(0.005, float(np.nanmin(densities)) if np.isfinite(densities).any() else 0.5))

    def draw(width: float) -> Figure:
        row_height = max(4.0, min(17.0, 900.0 / len(layers)))
        figure, (ax,) = new_axes(width, 60 + max(60.0, row_height * len(layers)))
        masked = np.ma.masked_invalid(np.clip(densities, floor, 1.0))
        ax.imshow(masked, aspect="auto", interpolation="none", cmap=tint_map(), norm=LogNorm(floor, 1.0))
        every = max(1, int(np.ceil(11.0 / row_height)))
        ax.set_yticks(range(0, len(layers), every), labels[::every], fontsize=9 if width == WIDE else 7.5)
        marks = spread(len(chosen), 8 if width == WIDE else 4)
        ax.set_xticks(marks, [short_count(chosen[i]["step"]) for i in marks])
        ax.set_xlabel("step")
        ax.grid(False)
        ax.spines["bottom"].set_visible(False)
        return figure

    caption = (
        f"A row is a layer, a column one of {len(chosen)} topology updates; from {format_share(floor)} "
        "(palest) to 100 % (fullest), on a logarithmic scale."
    )
    return on_page(name, title, caption, (Key("density", f"{format_share(floor)} to 100 %", "ramp"),), draw)


def draw_churn(run: RunData) -> FigureOnPage | None:
    """Share of active weights replaced at each topology update, and share of weights that were ever active."""
    flip_steps, flips = column(run.topology, "flip_rate")
    ever_steps, ever = column(run.topology, "ever_active")
    if not len(flip_steps) and not len(ever_steps):
        return None

    def draw(width: float) -> Figure:
        figure, (top, bottom) = new_axes(width, 300, panels=(1.0, 1.0))
        plot(top, flip_steps, flips, "optimizer", width)
        value_axis(top, "flip rate", 1.1 * max(flips.max(initial=0.0), 0.01), format_share)
        plot(bottom, ever_steps, ever, "density", width)
        value_axis(bottom, "ever active", 1.05, format_share)
        finish_steps(run, [top, bottom])
        return figure

    keys = (
        Key("optimizer", "flip rate: active weights replaced at a topology update"),
        Key("density", "ever active: weights that have been active at least once"),
    )
    return on_page("churn", "How the topology moves", "", keys, draw)


def draw_optimizer(run: RunData) -> FigureOnPage | None:
    """Learning rate and gradient norm."""
    rate_steps, rates = column(run.metrics, "lr")
    norm_steps, norms = column(run.metrics, "grad_norm")
    if not len(rate_steps) and not len(norm_steps):
        return None

    def draw(width: float) -> Figure:
        figure, (top, bottom) = new_axes(width, 320, panels=(1.0, 1.4))
        plot(top, rate_steps, rates, "loss", width)
        value_axis(top, "learning rate", 1.1 * max(rates.max(initial=0.0), 1e-12), "{:.2g}".format)
        plot(bottom, norm_steps, norms, "backward", width, alpha=0.35, linewidth=0.9)
        plot(bottom, norm_steps, smooth(norms), "backward", width)
        logarithmic(bottom, norms, ticks=5)
        bottom.set_ylabel("gradient norm")
        finish_steps(run, [top, bottom])
        return figure

    keys = (
        Key("loss", "learning rate, before the factor of a layer's density"),
        Key("backward", "gradient norm before clipping, each logged step", "faint"),
        Key("backward", "smoothed"),
    )
    return on_page("optimizer", "Learning rate and gradient norm", "", keys, draw)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average, same shape as `values`; it does not lag behind a falling loss.

    The window is symmetric, narrow at the steep start; at the flat end it looks back only.
    """
    count = len(values)
    index = np.arange(count)
    width = round(SMOOTHING_SHARE * count)
    before, after = np.minimum(index, width), np.minimum(np.minimum(index, count - 1 - index), width)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def short_layer_names(layers: list[str]) -> list[str]:
    """Layer names without the first and last dotted words that all of them share, at most 40 characters."""
    words = [name.split(".") for name in layers]
    for end, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while len(words) > 1 and all(len(w) > 1 for w in words) and len({w[end] for w in words}) == 1:
            words = [w[rest] for w in words]
    names = [".".join(w) for w in words]
    return [name if len(name) <= 40 else "…" + name[-39:] for name in names]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` evenly spread indices of `count` entries, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist() if count else []


def on_page(
    name: str, title: str, caption: str, keys: tuple[Key, ...], draw: Callable[[float], Figure]
) -> FigureOnPage:
    """Draw for both widths."""
    wide, narrow = (to_svg(draw(width), f"{name}-{width}", title) for width in (WIDE, NARROW))
    return FigureOnPage(name, title, caption, keys, Markup(wide), Markup(narrow))


def plot(ax: Axes, x: np.ndarray, y: np.ndarray, role: str, width: float, **looks: Any) -> None:
    """A curve, with as many points as can be told apart at this width."""
    ax.plot(*_thinned(x, y, width), **{"color": colour(role), "linewidth": 1.6, **looks})


def plot_dots(ax: Axes, x: np.ndarray, y: np.ndarray, role: str, width: float, **looks: Any) -> None:
    """A dot for each point, joined by nothing unless `looks` say so."""
    usual = {"color": colour(role), "marker": "o", "linestyle": "", "markersize": 4, "markeredgewidth": 0}
    ax.plot(*_thinned(x, y, width / 4), **{**usual, **looks})


def _thinned(x: np.ndarray, y: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    return thin_out(x, y, int(MAX_POINTS * width / WIDE))


def value_axis(ax: Axes, label: str, top: float, words: Callable[[float], str]) -> None:
    """A y axis from 0 to `top` with a few labels, written by `words`."""
    ax.set_ylim(0.0, top)
    ax.yaxis.set_major_formatter(lambda value, _: words(value))
    ax.locator_params(axis="y", nbins=4)
    ax.set_ylabel(label)


def finish_steps(run: RunData, axes: list[Axes], name_phases: bool = False) -> None:
    """Limits, marks and phases of axes over steps; the lowest one carries the labels.

    With `name_phases` the uppermost axes alone are shaded, and the phases named above them.
    """
    end = max([run.last_step, *(int(record["step"]) for record in run.topology[-1:])])
    phases = [(name, first, min(last, end)) for name, first, last in run.phase_spans() if first < end]
    pixels = 72.0 * axes[0].figure.get_figwidth()
    for ax in axes:
        ax.set_xlim(0.0, max(1.0, 1.005 * end))
    for ax in axes[:1] if name_phases else axes:
        for name, first, last in phases:
            if name in _PHASE_OPACITY:
                ax.axvspan(first, last, color=colour(name), alpha=_PHASE_OPACITY[name], linewidth=0, zorder=0)
    for name, first, last in phases if name_phases else ():
        # Eleven-point letters are about six and a half pixels wide.
        if 0.9 * pixels * (last - first) / end > 6.5 * len(name):
            looks = {"ha": "center", "va": "bottom", "fontsize": 10.5, "color": colour("muted")}
            place = axes[0].get_xaxis_transform()
            axes[0].text((first + last) / 2.0, 1.01, format_phase(name), transform=place, **looks)
    count_axis(axes[-1].xaxis, 7 if pixels > NARROW + 1 else 4)
    axes[-1].set_xlabel("step")


def _mark_end(ax: Axes, position: float, text: str, role: str, whole: float | None) -> None:
    """A vertical line with its words on the side where there is room."""
    ax.axvline(position, color=colour(role), linewidth=1.0, alpha=0.7)
    left = whole is not None and position > 0.5 * whole
    ax.annotate(
        text,
        (position, 0.97 if role == "dense" else 0.88),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=11,
        color=colour(role),
    )


def _average_stretches(
    steps: np.ndarray, values: np.ndarray, lengths: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` rows: means over neighbouring rows, weighted by the steps that each row stands for."""
    stretches = np.array_split(np.arange(len(steps)), min(limit, len(steps)))
    means = [np.average(values[stretch], axis=0, weights=lengths[stretch]) for stretch in stretches]
    return np.array([steps[stretch].mean() for stretch in stretches]), np.array(means)
