"""An objective from outside the package: next-token prediction with a penalty on the size of the logits (z-loss)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from extensions_setup import SETTINGS, write_corpus
from harness import run_distributed

from megasparse.config.loader import load_config
from megasparse.data import Batch
from megasparse.launching import LaunchEnvironment
from megasparse.models.gpt import GPT
from megasparse.objectives.objective import NextTokenCrossEntropy, Objective, ObjectiveResult
from megasparse.training.run import pretrain

WEIGHT = 0.5


class CrossEntropyWithZLoss:
    """Cross entropy + WEIGHT * mean of (log Z)^2, Z the sum of the exponentials of a token's logits."""

    def __call__(self, model: GPT, batch: Batch) -> ObjectiveResult:
        cross_entropy = NextTokenCrossEntropy()(model, batch).loss
        logits_BTV = model.logits(model.hidden_states(batch.inputs, batch.documents))
        z_loss = logits_BTV.float().logsumexp(-1).square().mean()
        return ObjectiveResult(cross_entropy + WEIGHT * z_loss, {"cross_entropy": cross_entropy, "z_loss": z_loss})


def train(words: list[str], objective: Objective | None) -> None:
    """One rank; in a process of its own, for DeepSpeed changes torch for the rest of a process."""
    pretrain(load_config([], words), LaunchEnvironment.from_variables(os.environ), objective)


def metrics(folder: Path, objective: Objective | None, *overrides: str, ranks: int = 1) -> list[dict]:
    words = [*SETTINGS, *write_corpus(folder), "run.name=run", *overrides]
    run_distributed(train, ranks, words, objective, with_mesh=False)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("zero_stage", "ranks"), [(0, 1), (3, 2)])
def test_a_new_objective_is_trained_for_and_its_parts_are_logged(tmp_path: Path, zero_stage: int, ranks: int) -> None:
    lines = metrics(tmp_path, CrossEntropyWithZLoss(), f"deepspeed.zero_stage={zero_stage}", ranks=ranks)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    for line in lines:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + WEIGHT * line["z_loss"], rel=1e-5)
    assert lines[-1]["z_loss"] < lines[0]["z_loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_without_one_the_metrics_name_no_parts(tmp_path: Path) -> None:
    lines = metrics(tmp_path, None)
    assert "z_loss" not in lines[-1] and lines[-1]["loss"] < lines[0]["loss"]
