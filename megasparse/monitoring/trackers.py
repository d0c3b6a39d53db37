"""Where the numbers of a run are shown while it trains: TensorBoard, Weights & Biases, MLflow. Rank 0 only.

    trackers = start_trackers(["tensorboard", "wandb"], TrackedRun(folder, resume_step, parameters), warn)
    trackers[0].scalars(10, {"loss": 2.5})
    trackers[0].close(failed=False)

``TRACKERS`` is the registry; a tracker from elsewhere is a class and an entry there. A tracker works in a thread of its
own, so that a slow server holds no step up, and one that fails is warned of once while training goes on. Names come
from the run folder; without a server all of them write into it.

Weights & Biases and MLflow cannot take back values. So a run that goes back to an earlier checkpoint is a new run
there, which gets the lines of ``metrics.jsonl`` that are kept; one that goes on where it ended keeps its identifier.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from megasparse.config.loader import ConfigError, dotted_values
from megasparse.monitoring.tracked_run import StoredRun, TrackedRun

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a tracker; what it has not sent by then stays in metrics.jsonl."""

MLFLOW_PARAMETERS, MLFLOW_METRICS, MLFLOW_VALUE = 100, 1000, 6000
"""MLflow's limits: parameters and metrics per call, characters of a parameter."""


class Tracker(Protocol):
    """Made with a ``TrackedRun``; may raise anything, at any time."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """step: finished steps; it rises from call to call."""

    def close(self, *, failed: bool) -> None:
        """failed: the run ended with an error."""


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run folder; steps that are done again replace the earlier ones."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WandbTracker:
    """Weights & Biases: into `wandb/` of the run folder, or to the server with WANDB_MODE=online.

    W&B's own way back to an earlier step (`resume_from`) is a preview that needs the server, and self-hosted servers
    lack it; a new run in the same group works everywhere.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        project = os.environ.get("WANDB_PROJECT") or run.project
        place = f"{mode}: {project}"
        stored = run.stored("wandb")
        identifier = stored.identifier if stored and stored.goes_on(place) else None
        self._run = wandb.init(
            project=project,
            group=run.name,
            name=run.name,
            id=identifier,
            resume="allow" if identifier else None,
            dir=run.folder,
            mode=mode,
            reinit="create_new",
            # The progress bar draws itself anew many times a second: no text for a log.
            settings=wandb.Settings(console="off"),
        )
        self._run.config.update(dict(run.parameters), allow_val_change=True)
        if identifier is None:
            for step, values in run.history():
                self.scalars(step, values)
            run.store("wandb", StoredRun(self._run.id, place))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step, commit=True)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


class MlflowTracker:
    """MLflow: into `mlflow.db` of the run folder, or to the server that MLFLOW_TRACKING_URI names.

    A step logged again would be a second value of that step; so a run that was gone back behind is deleted, which
    MLflow can undo (`mlflow.MlflowClient().restore_run`).
    """

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient

        folder = run.folder.absolute()
        server = os.environ.get("MLFLOW_TRACKING_URI")
        # By no path, so that a run folder can be moved.
        place = _without_password(server) if server else "run folder"
        self._client = MlflowClient(tracking_uri=server or f"sqlite:///{folder / 'mlflow.db'}")
        stored = run.stored("mlflow")
        if stored and stored.goes_on(place):
            self._identifier = stored.identifier
            self._client.update_run(self._identifier, status="RUNNING")
            self._set_parameters(run)
            return
        experiment = self._experiment(run.project, None if server else (folder / "mlflow_artifacts").as_uri())
        self._identifier = self._client.create_run(experiment, run_name=run.name).info.run_id
        self._set_parameters(run)
        self._log(run.history())
        run.store("mlflow", StoredRun(self._identifier, place))
        if stored and stored.place == place:
            self._client.delete_run(stored.identifier)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log([(step, values)])

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._identifier, "FAILED" if failed else "FINISHED")

    def _experiment(self, name: str, artifacts: str | None) -> str:
        from mlflow.exceptions import MlflowException

        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        try:
            return self._client.create_experiment(name, artifact_location=artifacts)
        except MlflowException:
            # Runs of one folder that start together: another one was first.
            if (found := self._client.get_experiment_by_name(name)) is None:
                raise
            return found.experiment_id

    def _log(self, lines: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = (Metric(name, value, now, step) for step, values in lines for name, value in values.items())
        for batch in _batches(metrics, MLFLOW_METRICS):
            self._client.log_batch(self._identifier, metrics=batch)

    def _set_parameters(self, run: TrackedRun) -> None:
        """MLflow's parameters are fixed once: those that have changed since are tags that name the step."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._identifier).data.params
        values = {name: text[:MLFLOW_VALUE] for name, text in dotted_values(run.parameters)}
        new = [Param(name, text) for name, text in values.items() if name not in known]
        changed = [
            RunTag(f"{name} from step {run.resume_step + 1}", text)
            for name, text in values.items()
            if known.get(name, text) != text
        ]
        for parameters in _batches(new, MLFLOW_PARAMETERS):
            self._client.log_batch(self._identifier, params=parameters)
        for tags in _batches(changed, MLFLOW_PARAMETERS):
            self._client.log_batch(self._identifier, tags=tags)


@dataclass(frozen=True)
class TrackerKind:
    """start: makes the tracker. packages: what it imports. extra: of setup.py, which installs them."""

    start: Callable[[TrackedRun], Tracker]
    packages: tuple[str, ...] = ()
    extra: str | None = None


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(TensorBoardTracker, ("tensorboard",), "monitor"),
    "wandb": TrackerKind(WandbTracker, ("wandb",), "wandb"),
    "mlflow": TrackerKind(MlflowTracker, ("mlflow", "sqlalchemy", "alembic"), "mlflow"),
}
"""By the name in `train.trackers`."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError for a tracker that is unknown, named twice, or not installed here."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"train.trackers: {name!r} is unknown; must be a list of {', '.join(TRACKERS)}")
        if names.count(name) > 1:
            raise ConfigError(f"train.trackers: {name!r} is named twice; must be a list of different names")
        if missing := _missing(name):
            extra = TRACKERS[name].extra
            usable = [other for other in TRACKERS if not _missing(other)]
            raise ConfigError(
                f"train.trackers: {name!r} needs the package {missing[0]}"
                f"{f' (extra `{extra}`)' if extra else ''}, which is not installed; "
                f"here it must be {'a list of ' + ', '.join(usable) if usable else '[]'}"
            )


def start_trackers(names: Sequence[str], run: TrackedRun, warn: Callable[[str], None]) -> list[Tracker]:
    """Before lines of metrics are removed: they tell whether the run goes back behind what was logged."""
    goes_back = run.last_step() > run.resume_step
    for name in TRACKERS:
        # One that is left out now would lack the steps of this start when it is named again.
        if (goes_back or name not in names) and (stored := run.stored(name)) is not None:
            run.store(name, StoredRun(stored.identifier, stored.place, superseded=True))
    return [BackgroundTracker(name, run, warn) for name in names]


class BackgroundTracker:
    """A tracker in a thread of its own. warn: called once at the most, from that thread or from the caller's."""

    def __init__(self, name: str, run: TrackedRun, warn: Callable[[str], None]) -> None:
        self._name, self._tracked, self._warn = name, run, warn
        self._lines: SimpleQueue[tuple[int, Mapping[str, float]] | None] = SimpleQueue()
        self._run_failed = self._has_warned = False
        self._thread = Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._thread.is_alive():
            self._lines.put((step, values))

    def close(self, *, failed: bool) -> None:
        self._run_failed = failed
        self._lines.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn_once(f"has not sent everything after {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name].start(self._tracked)
        except Exception as error:
            self._warn_once(f"does not start, and is off: {_first_line(error)}")
            return
        while (line := self._lines.get()) is not None:
            self._attempt(tracker.scalars, *line)
        self._attempt(partial(tracker.close, failed=self._run_failed))

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> None:
        """A failed call loses its values, and the next is tried: servers come back."""
        try:
            call(*arguments)
        except Exception as error:
            self._warn_once(f"failed: {_first_line(error)}")

    def _warn_once(self, text: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._warn(f"train.trackers: {self._name} {text}; metrics.jsonl has all values, and training goes on")


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


def _missing(name: str) -> list[str]:
    """A folder of that name in the working folder (Weights & Biases makes one) is found too, but has no origin."""
    found = {package: find_spec(package) for package in TRACKERS[name].packages}
    return [package for package, spec in found.items() if spec is None or spec.origin is None]


def _batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {_without_password(lines[0])}" if lines else type(error).__name__
