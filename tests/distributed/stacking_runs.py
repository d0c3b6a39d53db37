"""Runs that begin with two layers and go on with four, and what is seen of their engines; runs on every rank."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from extensions_setup import SETTINGS
from torch import Tensor

from megasparse.checkpoint.reader import Checkpoint
from megasparse.config.loader import load_config
from megasparse.conversion.sources import open_source, write_source
from megasparse.engine.restore import optimizer_step
from megasparse.launching import LaunchEnvironment
from megasparse.methods.callback import Callback, TrainingMethod
from megasparse.training.run import pretrain

GROWTH = 5
WORDS = [
    *SETTINGS,
    # The gradient of key biases is zero but for rounding, which Adam would blow up to full steps.
    "model.bias=false",
    "optimizer.epsilon=1e-6",
    "model.num_layers=4",
    "stacking.num_layers=2",
    # Of 12 steps: 4.8.
    "stacking.until=0.4",
    "train.valid_interval=6",
    "train.keep_checkpoints=9",
    # Where it grows the density falls, and is that of the last topology update.
    "sparsity.points=[[0,1],[0.5,0.3]]",
    "attention.overrides=[{every: 2, pattern: local}]",
    "attention.stride=4",
]
PASSING = ("tokens_per_s", "seconds")


class Watch(TrainingMethod):
    """Remembers weights, masks and moments at each start of a loop, and how often the optimizer has made a step."""

    name = "watch"

    def __init__(self, model: Any) -> None:
        self.model, self.starts, self.updates = model, [], []
        self.engine: Any = None

    def attach(self, engine: Any, mesh: Any) -> None:
        self.engine = engine

    def begin_run(self, step: Any) -> None:
        fragments = self.engine.access(dict(self.model.named_parameters())).fragments()
        self.starts.append(
            {
                "weights": {name: fragment.master.clone() for name, fragment in fragments.items()},
                "masks": {name: layer.mask.clone() for name, layer in self.model.sparse_layers().items()},
                "moments": sum(int(m.count_nonzero()) for f in fragments.values() for m in f.moments.values()),
            }
        )

    def after_step(self, step: Any) -> None:
        if self.engine is not None:
            self.updates.append(optimizer_step(self.engine))


class Killed(Exception):
    """In the place of a signal that cannot be caught."""


class Kill(Callback):
    """Ends the run in the middle of a step, which is lost."""

    def __init__(self, step: int) -> None:
        self.step = step

    def after_backward(self, step: Any) -> None:
        if step.number == self.step:
            raise Killed


def train(folder: Path, name: str, legs: Sequence[Sequence[str]], kill: int | None = None) -> list[Watch]:
    """A run in some starts, each with words of its own. kill: in this step of the first start."""
    environment, watches = LaunchEnvironment.from_variables(os.environ), []

    def watch(config: Any, model: Any, ranks: Any) -> Watch:
        watches.append(Watch(model))
        return watches[-1]

    for number, words in enumerate(legs):
        config = load_config([], [*WORDS, *words, f"run.folder={folder}", f"run.name={name}", "train.resume=auto"])
        callbacks = [Kill(kill)] if kill is not None and number == 0 else []
        # Drawing it would take longer than the run.
        with mock.patch("megasparse.training.run._leave_report", return_value=""), suppress(Killed):
            pretrain(config, environment, methods=[watch], callbacks=callbacks)
            assert not callbacks, "the run was to be killed"
    return [watch for watch in watches if watch.engine is not None]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Those of metrics, without what depends on the clock."""
    found = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(PASSING)} for line in found]


def state(folder: Path, name: str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    with Checkpoint(folder / name / "checkpoints" / f"step-{step:08d}") as saved:
        tensors = {f"{kind}/{key}": saved.tensor(key, kind) for key in saved.shapes for kind in saved.kinds(key)}
        return tensors | saved.topology()


def watch_growth(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """One undisturbed run: what both loops begin with, and whether the small model is gone after the growth."""
    small, whole = train(folder, name, [words])
    gone = weakref.ref(small.model)
    updates, starts = [small.updates, whole.updates], [*small.starts, *whole.starts]
    del small, whole
    gc.collect()
    return {"updates": updates, "starts": starts, "is_gone": gone() is None}


def disturb(folder: Path, data: list[str]) -> None:
    """The same run stopped at each of some steps, and killed in the first step after the growth."""
    stops = [f"train.stop_after={step}" for step in (3, GROWTH, GROWTH + 1)]
    train(folder, "stopped", [[*data, stop] for stop in stops] + [data])
    train(folder, "killed", [data, data], kill=GROWTH + 1)
    # Made longer after the growth, it does not shrink; damaged, it goes back to where the small model was good.
    train(folder, "longer", [[*data, "train.stop_after=7"], [*data, "train.steps=30", "train.stop_after=10"]])
    train(folder, "damaged", [[*data, "train.save_interval=4", "train.stop_after=7"]])
    for step in (GROWTH, 7):
        file = folder / "damaged" / "checkpoints" / f"step-{step:08d}" / "rank-00000.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(bytes(content))
    train(folder, "damaged", [[*data, "train.save_interval=4"]])
    # From a folder of the small model.
    write_source(open_source(folder / "undisturbed", GROWTH), folder / "model")
    train(folder, "begun", [[*data, f"train.init_from={folder / 'model'}", "train.stop_after=6"]])
