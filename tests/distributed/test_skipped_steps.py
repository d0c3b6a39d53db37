"""A step whose loss or gradient is not finite, or far above the recent ones, changes nothing: in every layout alike."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from engine_runs import Layout
from harness import run_distributed
from skip_runs import FAULTS, STEPS, run_faulty, run_to_the_limit
from trainer_runs import write_documents

SETTINGS = [
    "model.hidden_size=32",
    f"train.steps={STEPS}",
    "train.log_interval=1",
    "train.skip_step_sigma=6",
    "sparsity.block_size=8",
    "sparsity.update_interval=3",
    "data.valid_fraction=0",
]
WEIGHTS, BF16, UNCLIPPED = "sparsity.block_size=1", "train.precision=bf16", "optimizer.gradient_clipping=0"
ONE_RANK = [("one rank", [WEIGHTS], Layout(zero=0)), ("one rank, bf16", [BF16], Layout(zero=2, accumulation=2))]
TWO_RANKS = [
    ("zero 3, bf16", [BF16, WEIGHTS], Layout(2, zero=3)),
    ("zero 2, packed", ["sparsity.storage=packed", "sparsity.capacity_change_cost=0"], Layout(2, zero=2)),
    ("tensor parallel, unclipped", [UNCLIPPED, WEIGHTS], Layout(1, 2, zero=1)),
]
FURTHER = [
    ("zero 0, unclipped", [UNCLIPPED, WEIGHTS], Layout(2, zero=0, accumulation=2)),
    ("zero 0", [], Layout(2, zero=0)),
    ("zero 1, bf16, per-weight steps", [BF16, "sparsity.per_weight_step_counts=true"], Layout(2, zero=1)),
    ("zero 2, unclipped", [UNCLIPPED], Layout(2, zero=2, accumulation=2)),
    ("zero 3, unclipped", [UNCLIPPED], Layout(2, zero=3, accumulation=2)),
    ("tensor parallel, zero 0", [], Layout(1, 2, zero=0)),
    ("offload", ["deepspeed.offload_optimizer=cpu"], Layout(2, zero=2)),
]
RESUMED = ("one rank", "zero 3, bf16")
SKIPPED = sorted(FAULTS)
# Those of skipped steps are made in the first one that is not; the second of them makes the model dense again.
PUT_OFF = {6: 7, 39: 41}


def check(results: list[dict[str, dict[str, Any]]]) -> None:
    for name, result in results[0].items():
        # As text, in which NaN equals NaN.
        assert all(repr(other[name]) == repr(result) for other in results), f"{name}: ranks differ"
        lines = result["lines"]
        assert result["skipped"] == SKIPPED, name
        updates = set(result["updates"])
        assert updates.issuperset(PUT_OFF.values()) and updates.isdisjoint(FAULTS), name
        assert all(step % 3 == 0 for step in updates.difference(PUT_OFF.values())), name
        assert lines[40]["density"] < 1.0 and lines[-1]["density"] == 1.0, name
        assert [line["skipped_steps"] for line in lines] == [
            sum(fault < line["step"] for fault in FAULTS) for line in lines
        ], name
        assert [line["step"] for line in lines if line["loss"] is None] == [1, 7, 9], name
        assert [line["step"] for line in lines if not math.isfinite(line["grad_norm"])] == [1, 7, 9], name
        # The objective was not touched where only gradients were.
        assert lines[40]["loss"] < lines[1]["loss"] - 0.5, name


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [(2, TWO_RANKS), *(pytest.param(*more, marks=pytest.mark.exhaustive) for more in ((1, ONE_RANK), (2, FURTHER)))],
)
def test_skipped_steps_change_nothing_on_any_rank(tmp_path: Path, ranks: int, cases: list) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    cases = [(name, [*SETTINGS, data, *words], layout) for name, words, layout in cases]
    results = run_distributed(run_faulty, ranks, cases, tmp_path / "straight", [None])
    check(results)
    # Right after a topology update that was put off, and where the recent norms decide of the next step.
    chosen = (
        cases
        if ranks == 1
        else [case for case in cases if case[0] in ("zero 1, bf16, per-weight steps", "zero 3, bf16")]
    )
    resumed = run_distributed(run_faulty, ranks, chosen, tmp_path / "resumed", [7, 39, None])
    check(resumed)
    for name, _, _ in chosen:
        assert repr(resumed[0][name]) == repr(results[0][name]), f"{name}: bit for bit"


def test_too_many_in_a_row_end_the_run_and_spoil_nothing(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    # A checkpoint would be due after the second skipped step, too.
    limits = ["train.steps=24", "train.max_skipped_steps=4", "train.save_interval=4", "train.keep_checkpoints=1"]
    first, second = run_distributed(run_to_the_limit, 2, [*SETTINGS, data, *limits], tmp_path)
    assert first == second
    assert first["error"].startswith("step 18 is skipped, number 4 in a row (train.max_skipped_steps): a loss or gra")
    assert "as after step 14" in first["error"] and "train.resume=auto" in first["error"]
    assert first["saved"] == ["step-00000012"]
    assert first["resumed"] == first["straight"][12:]
