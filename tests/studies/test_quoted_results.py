"""What READMEs say of studies, decoding and pruning is what the committed results hold."""

from __future__ import annotations

import json
import math
from statistics import mean, stdev

import pytest
from quote_results import PAGES, QUOTED, with_tables
from test_architecture import ROOT

QUOTES = [(path, found[2]) for path in PAGES for found in QUOTED.finditer(path.read_text(encoding="utf-8"))]
CRITICAL_T = {2: 12.706204736, 3: 4.302652730, 4: 3.182446305, 5: 2.776445105}
"""Student's t at 97.5 %, by the number of pairs."""


def test_every_page_quotes_results() -> None:
    assert {path for path, _ in QUOTES} == set(PAGES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_tables_are_those_of_the_results(path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page == with_tables(page), "python tests/quote_results.py writes them anew"


@pytest.mark.parametrize("file", sorted({file for _, file in QUOTES if "/study_" in file}))
def test_means_and_intervals_follow_from_the_runs(file: str) -> None:
    """Computed from the losses of the runs, in other words than those of the study tool."""
    results = json.loads((ROOT / file).read_text(encoding="utf-8"))
    losses = {arm["arm"]: {run["seed"]: run["val_loss"] for run in arm["runs"]} for arm in results["arms"]}
    for arm in results["arms"]:
        if arm["n"]:
            assert arm["n"] == len(losses[arm["arm"]])
            assert arm["mean"] == pytest.approx(mean(losses[arm["arm"]].values()))
            assert abs(arm["flops"] / results["budget_flops"] - 1) < 0.01 or arm["solve"] == "none"
    assert results["differences"]
    for one in results["differences"]:
        check_difference(one, losses)
    accuracies = {arm["arm"]: {run["seed"]: run.get("task_accuracy") for run in arm["runs"]} for arm in results["arms"]}
    for one in results["accuracy_differences"]:
        check_difference(one, accuracies)


def check_difference(one: dict, values: dict[str, dict[int, float]]) -> None:
    theirs = values[one["baseline"]]
    pairs = [value - theirs[seed] for seed, value in values[one["arm"]].items() if seed in theirs]
    assert (one["n"], one["mean"]) == (len(pairs), pytest.approx(mean(pairs)))
    if len(pairs) in CRITICAL_T:
        width = CRITICAL_T[len(pairs)] * stdev(pairs) / math.sqrt(len(pairs))
        assert one["half_width"] == pytest.approx(width, rel=1e-6)
