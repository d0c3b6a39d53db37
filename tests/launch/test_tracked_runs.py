"""Weights & Biases and MLflow, without a server, over a run of two ranks that stops, goes on, and goes back."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from runs import command, metrics, run
from tracked_runs import mlflow_runs, wandb_runs

PACKAGES = ("wandb", "mlflow", "sqlalchemy", "alembic")
MISSING = [package for package in PACKAGES if find_spec(package) is None]

pytestmark = pytest.mark.timeout(400)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_curves_show_each_step_once(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    settings = ["run.name=shown", "train.trackers=[wandb, mlflow]", "train.resume=auto", "train.save_interval=8"]
    folder = tmp_path / "shown"

    run(command(corpus, tmp_path, *settings, "train.stop_after=10"))
    run(command(corpus, tmp_path, *settings))
    (shown,) = mlflow_runs(folder)
    assert shown["values"]["loss"] == losses(folder) and [step for step, _ in losses(folder)] == list(range(1, 25))
    assert shown["status"] == "FINISHED" and shown["project"] == tmp_path.name
    assert shown["parameters"]["train.steps"] == "24" and "plan.parameters.total" in shown["parameters"]
    first, second = wandb_runs(folder)
    assert first["id"] == second["id"]
    assert [(step, values["loss"]) for step, values in first["curve"] + second["curve"]] == losses(folder)

    # As if the run had been killed after its last step, before the checkpoint of it.
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    run(command(corpus, tmp_path, *settings))
    (again,) = mlflow_runs(folder)
    assert again["id"] != shown["id"] and again["values"]["loss"] == losses(folder)
    third = wandb_runs(folder)[-1]
    assert third["id"] != first["id"] and third["exit"] == 0
    assert [(step, values["loss"]) for step, values in third["curve"]] == losses(folder)


def test_an_unknown_tracker_is_refused_before_anything_starts(corpus: Path, tmp_path: Path) -> None:
    refused = run(command(corpus, tmp_path, "train.trackers=[comet]", ranks=1), expect=2)
    assert "train.trackers: 'comet' is unknown; must be a list of tensorboard, wandb, mlflow" in refused.stdout
    assert not (tmp_path / "run").exists()


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(folder)]
