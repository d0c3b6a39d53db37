"""The table of benchmarks/adapters.py: means over seeds, and differences in pairs with 95 % intervals.

print(table(rows, ("full", "lora", "smt")))
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from megasparse.studies.statistics import paired, spread

COMPARED = ("lora", "full")
"""The first of these that has runs is what the others are compared with."""


def best_rate(rows: Iterable[dict[str, Any]]) -> float:
    """The one of least validation loss."""
    return min(rows, key=_loss)["rate"]


def table(rows: Sequence[dict[str, Any]], arms: Sequence[str]) -> str:
    """rows: runs at one rate an arm, each arm with the same seeds."""
    by_arm = {arm: sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"]) for arm in arms}
    baseline = next((arm for arm in COMPARED if by_arm.get(arm)), None)
    head = ["arm", "rate", "trained", "validation loss", "accuracy", "optimizer bytes", "most bytes", "seconds"]
    other = [] if baseline is None else [f"loss minus {baseline}", f"accuracy minus {baseline}"]
    lines = [f"| {' | '.join([*head, *other])} |", "|---" * (len(head) + len(other)) + "|"]
    for arm, of_arm in by_arm.items():
        if not all(math.isfinite(_loss(row)) for row in of_arm):
            lines.append(f"| {arm} | the loss was not finite |" + " |" * (len(head) + len(other) - 2))
            continue
        cells = [arm, f"{of_arm[0]['rate']:g}", f"{of_arm[0]['trained']:,}"]
        cells += [_mean([row["validation_loss"] for row in of_arm], 4), _mean([row["accuracy"] for row in of_arm], 3)]
        cells += [f"{of_arm[0][name]:,}" for name in ("optimizer_bytes", "peak_bytes")]
        cells.append(f"{statistics.median(row['seconds'] for row in of_arm):.1f}")
        if baseline is not None:
            same = arm == baseline
            cells += [
                "" if same else _against(of_arm, by_arm[baseline], name) for name in ("validation_loss", "accuracy")
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loss(row: dict[str, Any]) -> float:
    loss = row["validation_loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def _mean(values: Sequence[float | None], digits: int) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    deviation = spread(numbers)
    return f"{statistics.fmean(numbers):.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _against(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], name: str) -> str:
    """Mean of the pairs' differences, and its interval."""
    pairs = [(row[name], other[name]) for row, other in zip(rows, others, strict=True)]
    if any(value is None or not math.isfinite(value) for pair in pairs for value in pair):
        return ""
    found = paired([value for value, _ in pairs], [other for _, other in pairs])
    if found.half_width is None:
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} ({found.mean - found.half_width:+.4f} to {found.mean + found.half_width:+.4f})"
