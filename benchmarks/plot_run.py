"""Draws the picture of the README from the metrics of a run.

python benchmarks/plot_run.py runs/quickstart-mst --output benchmarks/results/quickstart.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

PHASE_COLOURS = {"warm_up": "#f2c14e", "ultra_sparse": "#5b8e7d", "restoration": "#4d9de0", "dense": "#8d99ae"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in (arguments.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, (loss, density, cost) = plt.subplots(1, 3, figsize=(12, 3.2), constrained_layout=True)
    draw_losses(loss, lines)
    density.plot(steps(lines), [100 * line["density"] for line in lines], color="black")
    density.set(title="active weights, %", ylim=(0, 105))
    for name, style in (("dense", ":"), ("algorithmic", "-")):
        cost.plot(steps(lines), [line[f"flops_{name}"] / 1e12 for line in lines], style, color="black", label=name)
    cost.set(title="FLOPs so far, 10^12")
    cost.legend(frameon=False)
    for axes in (loss, density, cost):
        shade_phases(axes, lines)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=110)


def draw_losses(axes: plt.Axes, lines: list[dict]) -> None:
    axes.plot(steps(lines), [line["loss"] for line in lines], color="#999999", linewidth=1, label="training")
    validated = [line for line in lines if "val_loss" in line]
    axes.plot(steps(validated), [line["val_loss"] for line in validated], "o-", color="black", ms=3, label="validation")
    axes.set(title="loss, nats per token", ylim=(None, lines[0]["loss"]))
    axes.legend(frameon=False)


def shade_phases(axes: plt.Axes, lines: list[dict]) -> None:
    for phase, colour in PHASE_COLOURS.items():
        inside = [line["step"] for line in lines if line["phase"] == phase]
        if inside:
            first = max([line["step"] for line in lines if line["step"] < inside[0]], default=0)
            axes.axvspan(first, inside[-1], color=colour, alpha=0.18, linewidth=0)


def steps(lines: list[dict]) -> list[int]:
    return [line["step"] for line in lines]


if __name__ == "__main__":
    main()
