"""Matplotlib figures as inline SVG that takes its colours and fonts from the page.

A figure is drawn once per width, in marker colours: one per *role* (``loss``, ``grid``, ...). ``to_svg`` replaces each
marker by a CSS variable, so that one file serves the light and the dark scheme, and strips what would clash or point
outside when several SVGs share a page: identifiers, style rules, fonts, name spaces.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image

from megasparse.utils.format import format_count

ROLES = (
    *("ink", "muted", "grid", "loss", "validation", "density", "dense", "warm_up", "ultra_sparse", "restoration"),
    *("forward", "backward", "optimizer", "topology", "data"),
    *(f"run_{number}" for number in range(1, 9)),
)
"""Names of the colours; the page defines `--<role>` for each. `run_1` to `run_8` tell runs apart."""

TINT = (16, 158, 148)
"""The one colour baked into bitmaps, as RGB; what is inactive is transparent, so it is legible on light and on dark."""

_RC = {"svg.fonttype": "none", "svg.hashsalt": "megasparse", "text.parse_math": False, "axes.unicode_minus": True}


def colour(role: str) -> str:
    """The marker colour of a role, to be passed to Matplotlib."""
    return f"#{0xFE0100 + ROLES.index(role):06x}"


def new_axes(width: float, height: float, panels: Sequence[float] = (1.0,)) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` page pixels with panels of the given relative heights over a common x axis."""
    with matplotlib.rc_context(_RC):
        # 72 units per inch make one unit of the SVG's view box one pixel at full width.
        figure = Figure(figsize=(width / 72.0, height / 72.0), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=list(panels))
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.05)
        axes = list(grid[:, 0])
        for ax in axes:
            _dress(ax)
    return figure, axes


def to_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an `<svg>` element: `prefix` makes its identifiers unique on the page."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<style\b.*?</style>", "", drawing, flags=re.S)
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.S)
    view_box = re.findall(r'viewBox="([^"]*)"', drawing)[0]
    label = html.escape(description)
    drawing = re.sub(r"<svg[^>]*>", f'<svg viewBox="{view_box}" role="img" aria-label="{label}">', drawing, count=1)
    # Matplotlib before 3.11 writes weight, size and family as one property, later versions as three.
    drawing = re.sub(r"font: (?:(\w+) )?([\d.]+px) [^;\"]*", _size_and_weight, drawing)
    drawing = re.sub(r"font-family: [^;\"]*;? ?", "", drawing)
    drawing = re.sub(r' id="(?:figure|axes|patch|text|line2d|xtick|ytick|matplotlib|[A-Z])[^"]*"', "", drawing)
    drawing = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawing)
    for role in ROLES:
        drawing = drawing.replace(colour(role), f"var(--{role})")
    return re.sub(r"\s*\n\s*", "\n", drawing).strip()


def tint_map() -> LinearSegmentedColormap:
    """From nearly transparent to the full tint."""
    red, green, blue = (channel / 255.0 for channel in TINT)
    return LinearSegmentedColormap.from_list("tint", [(red, green, blue, 0.08), (red, green, blue, 1.0)])


def tinted_picture(path: Path, largest_side: int) -> tuple[str, int, int]:
    """A grey picture as a data URI of a PNG in the tint (bright = opaque), with its width and height in pixels.

    Pictures with a side above `largest_side` are averaged down to it. Raises OSError or ValueError for what is no
    picture.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            grey = picture.convert("L")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path.name}: {error}") from error
    scale = largest_side / max(grey.size)
    if scale < 1.0:
        grey = grey.resize([max(1, round(side * scale)) for side in grey.size], Image.Resampling.BOX)
    # 16 levels of opacity in a palette: a quarter of the bytes of grey with alpha.
    levels = 16
    indices = Image.fromarray((np.asarray(grey, dtype=np.uint16) * (levels - 1) // 255).astype(np.uint8))
    indices.putpalette(list(TINT) * levels)
    buffer = io.BytesIO()
    opacities = bytes(255 * level // (levels - 1) for level in range(levels))
    indices.save(buffer, format="PNG", optimize=True, transparency=opacities, bits=4)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), *indices.size


def thin_out(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a curve: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(x) <= limit:
        return x, y
    kept = {0, len(x) - 1}
    for stretch in np.array_split(np.arange(len(x)), max(1, limit // 2 - 1)):
        kept.update((stretch[np.argmin(y[stretch])], stretch[np.argmax(y[stretch])]))
    index = np.array(sorted(kept))
    return x[index], y[index]


def count_axis(axis: Any, ticks: int = 6) -> None:
    """Whole numbers in short form (1,000 -> `1.00 K` without needless zeros)."""
    axis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(lambda value, _: short_count(value))


def short_count(value: float) -> str:
    """`250`, `1.5 K`, `20 K`, for tick labels."""
    if abs(value) < 10_000:
        return f"{value:,.0f}"
    number, _, unit = format_count(value).partition(" ")
    return f"{float(number):g} {unit}".strip()


def logarithmic(ax: Axes, values: np.ndarray, ticks: int = 6) -> None:
    """A logarithmic y axis with round labels, where all values are positive."""
    if len(values) and values.min() > 0.0:
        ax.set_yscale("log")
        ratio = values.max() / values.min()
        if ratio < 2.5:
            locator = MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10])
        elif ratio < 30.0:
            # Powers of ten alone would leave one or two marks on a loss that goes from 11 to 2.
            locator = LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))
        else:
            locator = LogLocator(numticks=ticks)
        ax.yaxis.set_major_locator(locator)
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def loss_axis(ax: Axes, values: np.ndarray) -> None:
    """A y axis of losses, which says where it is logarithmic."""
    logarithmic(ax, values)
    ax.set_ylabel("loss (log scale)" if ax.get_yscale() == "log" else "loss")


def _size_and_weight(shorthand: re.Match[str]) -> str:
    weight, size = shorthand.groups()
    return f"font-size: {size}" + (f"; font-weight: {weight}" if weight else "")


def _dress(ax: Axes) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(colour("grid"))
    ax.tick_params(colors=colour("muted"), length=0, labelsize=11, pad=6)
    ax.grid(True, axis="y", color=colour("grid"), linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.0)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_fontsize(11)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_color(colour("muted"))
