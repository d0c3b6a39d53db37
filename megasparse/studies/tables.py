"""Rows of a study's tables, for the console and the page alike.

print_table(arm_rows(results), make_console())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heapreplace
from statistics import fmean
from typing import Any

from megasparse.studies.solving import SolvedArm
from megasparse.utils.format import (
    MISSING,
    format_compact,
    format_count,
    format_decimal,
    format_flops,
    format_seconds,
    format_share,
)

Row = dict[str, str]


def plan_rows(arms: Sequence[SolvedArm], budget: float, seconds: Mapping[str, float]) -> list[Row]:
    """What each arm will cost. seconds: of a run, by arm; may lack some.

    budget: share of it that is spent. of dense: share of what the same model and steps would cost with every weight.
    active: mean over the steps of the active parameters, embeddings included; per active: tokens for each of them.
    """
    return [
        {
            "arm": arm.name,
            "shape": f"{arm.config.model.num_layers} x {arm.config.model.hidden_size}",
            "steps": f"{arm.config.train.steps:,}",
            "tokens": format_count(arm.tokens),
            "FLOPs": format_flops(arm.flops),
            "budget": format_share(arm.flops / budget),
            "of dense": format_share(arm.plan["flops"]["ratio"]),
            "active": format_count(arm.mean_active),
            "per active": format_compact(arm.tokens / arm.mean_active),
            "lr": ", ".join(f"{rate:g}" for rate in arm.rates),
            "a run": format_seconds(seconds.get(arm.name)),
        }
        for arm in arms
    ]


def total_seconds(arms: Sequence[SolvedArm], seeds: int, seconds: Mapping[str, float], processes: int) -> float | None:
    """Of all runs, so many at a time, sweep first; None where the seconds of an arm are not known."""
    if not all(arm.name in seconds for arm in arms):
        return None
    sweep = [seconds[arm.name] for arm in arms if len(arm.rates) > 1 for _ in arm.rates]
    return sum(_side_by_side(runs, processes) for runs in (sweep, [seconds[arm.name] for arm in arms] * seeds))


def _side_by_side(runs: Sequence[float], processes: int) -> float:
    ends = [0.0] * processes
    heapify(ends)
    for run in runs:
        heapreplace(ends, ends[0] + run)
    return max(ends)


def arm_rows(results: Mapping[str, Any]) -> list[Row]:
    """What each arm has reached."""
    return [
        {
            "arm": arm["arm"],
            "validation loss": _plus_minus(arm["mean"], arm["spread"]),
            **({"task accuracy": _plus_minus(arm["accuracy"], arm["accuracy_spread"])} if "accuracy" in arm else {}),
            "n": str(arm["n"]),
            "lr": format_compact(arm["lr"]),
            "shape": f"{arm['num_layers']} x {arm['hidden_size']}",
            "steps": f"{arm['steps']:,}",
            "tokens": format_count(arm["tokens"]),
            "FLOPs": format_flops(_spent(arm)),
            "budget": format_share(_spent(arm) / results["budget_flops"]),
            "training": format_seconds(arm["seconds"]),
        }
        for arm in results["arms"]
    ]


def _spent(arm: Mapping[str, Any]) -> float:
    """By the runs, where there are any: some methods decide while they train how much they compute."""
    return fmean(run["flops"] for run in arm["runs"]) if arm["runs"] else arm["flops"]


def difference_rows(results: Mapping[str, Any], of: str = "differences") -> list[Row]:
    """Paired differences with their confidence intervals. of: those of the loss, or `accuracy_differences`."""
    share = format_share(results["confidence"])
    return [
        {
            "arm": one["arm"],
            "minus": one["baseline"],
            "difference": f"{one['mean']:+.4f}",
            f"{share} interval": _interval(one["mean"], one["half_width"]),
            "pairs": str(one["n"]),
            "below": f"{one['below']} of {one['n']}",
        }
        for one in results.get(of, [])
    ]


def sweep_rows(results: Mapping[str, Any]) -> list[Row]:
    """Validation losses with which learning rates were chosen."""
    return [
        {"arm": arm["arm"], "lr": f"{run['lr']:g}", "validation loss": format_decimal(run["val_loss"], 4)}
        for arm in results["arms"]
        for run in arm["sweep"]
    ]


def _plus_minus(mean: float | None, spread: float | None) -> str:
    return format_decimal(mean, 4) + ("" if spread is None else f" ± {spread:.4f}")


def _interval(mean: float, half_width: float | None) -> str:
    return MISSING if half_width is None else f"{mean - half_width:+.4f} to {mean + half_width:+.4f}"
