"""Trackers: real TensorBoard, Weights & Biases and MLflow without a server; restarts, failures, missing packages."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from tracked_runs import mlflow_runs, wandb_runs

from megasparse.config.loader import ConfigError
from megasparse.monitoring import trackers
from megasparse.monitoring.records import RunRecords
from megasparse.monitoring.tracked_run import TrackedRun
from megasparse.monitoring.trackers import TRACKERS, TrackerKind, check_trackers

PARAMETERS = {"train": {"steps": 8, "precision": "fp32"}, "sparsity": {"groups": []}, "plan": {"tokens": {"total": 64}}}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


needs_wandb = needs("wandb")
needs_mlflow = needs("mlflow", "sqlalchemy", "alembic")


@pytest.fixture(autouse=True)
def no_variables_of_the_user(monkeypatch) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "experiments" / "first"
    path.mkdir(parents=True)
    return path


def run(folder: Path, names: list[str], steps: range, *, sign: float = 1.0, parameters=PARAMETERS, **more) -> list[str]:
    """Records a few steps, beginning after step `steps.start - 1`; returns the warnings."""
    warnings: list[str] = []
    start = steps.start - 1
    with RunRecords(
        folder, resume_step=start, trackers=names, parameters=parameters, warn=warnings.append, **more
    ) as records:
        for step in steps:
            records.metrics({"step": step, "loss": sign * step, "lr": 0.5, "phase": "dense"})
    return warnings


def curve(*parts: tuple[range, float]) -> list[tuple[int, float]]:
    return [(step, sign * step) for steps, sign in parts for step in steps]


@needs("tensorboard")
def test_tensorboard_shows_a_step_once_after_a_restart(folder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(folder, ["tensorboard"], range(1, 6)) == []
    assert run(folder, ["tensorboard"], range(4, 7), sign=-1.0) == []
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == curve((range(1, 4), 1), (range(4, 7), -1))
    # From the beginning, too: a run without a checkpoint.
    assert run(folder, ["tensorboard"], range(1, 3), sign=2.0) == []
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == curve((range(1, 3), 2))
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]


@needs_wandb
def test_wandb_goes_on_in_the_same_run(folder) -> None:
    assert run(folder, ["wandb"], range(1, 4)) == []
    changed = {**PARAMETERS, "train": {"steps": 9}}
    assert run(folder, ["wandb"], range(4, 6), parameters=changed) == []
    first, second = wandb_runs(folder)
    assert first["id"] == second["id"]
    assert (first["name"], first["project"], first["group"]) == ("first", "experiments", "first")
    assert first["parameters"]["plan"] == {"tokens": {"total": 64}} and first["parameters"]["train"]["steps"] == 8
    assert second["parameters"]["train"]["steps"] == 9
    assert [(s, v["loss"]) for s, v in first["curve"] + second["curve"]] == curve((range(1, 6), 1))
    assert set(first["curve"][0][1]) == {"loss", "lr"} and first["exit"] == 0


@needs_wandb
def test_wandb_is_a_new_run_with_the_kept_curve_where_the_run_goes_back(folder, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "sparse")
    run(folder, ["wandb"], range(1, 6))
    run(folder, ["wandb"], range(4, 7), sign=-1.0)
    first, second = wandb_runs(folder)
    assert first["id"] != second["id"] and first["group"] == second["group"] == "first"
    assert second["project"] == "sparse"
    assert [(s, v["loss"]) for s, v in second["curve"]] == curve((range(1, 4), 1), (range(4, 7), -1))


@needs_mlflow
def test_mlflow_goes_on_in_the_same_run(folder) -> None:
    assert run(folder, ["mlflow"], range(1, 4)) == []
    (before,) = mlflow_runs(folder)
    changed = {**PARAMETERS, "train": {"steps": 9, "precision": "fp32"}, "data": {"seed": 1}}
    assert run(folder, ["mlflow"], range(4, 6), parameters=changed) == []
    (after,) = mlflow_runs(folder)
    assert before["id"] == after["id"] and after["status"] == "FINISHED"
    assert (after["name"], after["project"]) == ("first", "experiments")
    assert after["values"] == {"loss": curve((range(1, 6), 1)), "lr": [(step, 0.5) for step in range(1, 6)]}
    assert before["parameters"] == {
        "train.steps": "8",
        "train.precision": "fp32",
        "sparsity.groups": "[]",
        "plan.tokens.total": "64",
    }
    assert after["parameters"] == {**before["parameters"], "data.seed": "1"}
    assert {k: v for k, v in after["tags"].items() if not k.startswith("mlflow.")} == {"train.steps from step 4": "9"}


@needs_mlflow
def test_mlflow_is_a_new_run_with_the_kept_curve_where_the_run_goes_back(folder, tmp_path, monkeypatch) -> None:
    place = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    run(folder, ["mlflow"], range(1, 6))
    (first,) = mlflow_runs(folder, place)
    run(folder, ["mlflow"], range(4, 7), sign=-1.0)
    (second,) = mlflow_runs(folder, place)
    assert first["id"] != second["id"]
    assert second["values"]["loss"] == curve((range(1, 4), 1), (range(4, 7), -1))
    assert not (folder / "mlflow.db").exists()


@needs_mlflow
def test_a_run_folder_that_was_moved_goes_on_with_its_own_mlflow_run(folder) -> None:
    run(folder, ["mlflow"], range(1, 4))
    (before,) = mlflow_runs(folder)
    moved = folder.rename(folder.with_name("second"))
    run(moved, ["mlflow"], range(4, 6))
    (after,) = mlflow_runs(moved)
    assert before["id"] == after["id"] and after["values"]["loss"] == curve((range(1, 6), 1))


@needs_mlflow
def test_no_password_is_written_down(folder, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org/base")
    local = MlflowClient(tracking_uri=f"sqlite:///{folder / 'elsewhere.db'}")
    asked: list[str] = []
    monkeypatch.setattr("mlflow.MlflowClient", lambda tracking_uri: asked.append(tracking_uri) or local)
    assert run(folder, ["mlflow"], range(1, 3)) == []
    assert asked == ["https://me:secret@mlflow.example.org/base"]
    stored = json.loads((folder / "mlflow_run.json").read_text())
    assert stored["place"] == "https://mlflow.example.org/base"


@needs_mlflow
def test_a_tracker_named_later_gets_the_whole_curve(folder) -> None:
    run(folder, [], range(1, 4))
    run(folder, ["mlflow"], range(4, 6))
    (found,) = mlflow_runs(folder)
    assert found["values"]["loss"] == curve((range(1, 6), 1))
    run(folder, [], range(6, 8))
    run(folder, ["mlflow"], range(8, 9))
    (found,) = mlflow_runs(folder)
    assert found["values"]["loss"] == curve((range(1, 9), 1))


@needs_mlflow
def test_a_run_that_fails_is_shown_as_failed(folder) -> None:
    with pytest.raises(KeyError), RunRecords(folder, resume_step=0, trackers=["mlflow"]) as records:
        records.metrics({"step": 1, "loss": 2.0})
        raise KeyError
    (found,) = mlflow_runs(folder)
    assert found["status"] == "FAILED" and found["values"]["loss"] == [(1, 2.0)]


@needs_mlflow
def test_a_server_that_does_not_answer_is_warned_of(folder, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (warning,) = run(folder, ["mlflow"], range(1, 4))
    assert warning.startswith("train.trackers: mlflow does not start, and is off: ")
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


class Fragile:
    """Fails at step 2 as where a disk is full, and works again after it."""

    def __init__(self, run: TrackedRun) -> None:
        self.lines = (run.folder / "fragile.txt").open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise OSError("No space left on device")
        print(step, values["loss"], file=self.lines)

    def close(self, *, failed: bool) -> None:
        self.lines.close()


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(folder, monkeypatch) -> None:
    monkeypatch.setitem(TRACKERS, "fragile", TrackerKind(Fragile))
    warnings = run(folder, ["fragile"], range(1, 5))
    assert warnings == [
        "train.trackers: fragile failed: OSError: No space left on device; metrics.jsonl has all values, "
        "and training goes on"
    ]
    assert (folder / "fragile.txt").read_text() == "1 1.0\n3 3.0\n4 4.0\n"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_hangs_holds_nothing_up(folder, monkeypatch) -> None:
    answer = threading.Event()

    class Silent(Fragile):
        def scalars(self, step: int, values: Mapping[str, float]) -> None:
            answer.wait(60)

    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setitem(TRACKERS, "silent", TrackerKind(Silent))
    (warning,) = run(folder, ["silent"], range(1, 200))
    assert warning.startswith("train.trackers: silent has not sent everything after 0 s")
    answer.set()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["wand"], "train.trackers: 'wand' is unknown; must be a list of tensorboard, wandb, mlflow"),
        (
            ["absent"],
            r"train.trackers: 'absent' needs the package no_such_package \(extra `more`\), .* must be a list of",
        ),
        (["here", "here"], "train.trackers: 'here' is named twice; must be a list of different names"),
    ],
)
def test_names_that_cannot_be_used_are_refused(names, message, monkeypatch) -> None:
    monkeypatch.setitem(TRACKERS, "absent", TrackerKind(Fragile, ("no_such_package",), "more"))
    monkeypatch.setitem(TRACKERS, "here", TrackerKind(Fragile, ("json",)))
    with pytest.raises(ConfigError, match=message):
        check_trackers(names)


def test_a_folder_of_the_name_of_a_package_is_none(tmp_path, monkeypatch) -> None:
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "folder", TrackerKind(Fragile, ("only_a_folder",)))
    with pytest.raises(ConfigError, match="'folder' needs the package only_a_folder, which is not installed"):
        check_trackers(["folder"])
