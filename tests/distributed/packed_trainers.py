"""Runs with packed storage from configuration to checkpoints, stopped, killed and gone on with; runs on every rank."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from extensions_setup import SETTINGS
from stacking_runs import Kill, Killed

from megasparse.config.loader import load_config
from megasparse.launching import LaunchEnvironment
from megasparse.methods.callback import Callback
from megasparse.training.run import pretrain

PACKED, DENSE = "sparsity.storage=packed", "sparsity.storage=dense"
STEPS = 20
CHANGES = (3, 5, 11, 13)
"""Finished steps after which the capacity changes."""
WORDS = [
    *SETTINGS,
    # The gradient of key biases is zero but for rounding, which Adam would blow up to full steps.
    "model.bias=false",
    "optimizer.epsilon=1e-6",
    f"train.steps={STEPS}",
    "train.log_interval=1",
    "train.valid_interval=6",
    "train.keep_checkpoints=9",
    "sparsity.algorithm=mst",
    "sparsity.density=0.2",
    "sparsity.capacity_change_cost=0",
    "sparsity.warmup_end=0.2",
    "sparsity.restoration_start=0.5",
    "sparsity.restoration_end=0.8",
    "attention.stride=4",
]


class Alive(Callback):
    """Whether models of earlier engines are still in memory when a new one has come."""

    def __init__(self) -> None:
        self.models: list[weakref.ref] = []

    def take_engine(self, engine: Any, methods: Sequence[Any]) -> None:
        gc.collect()
        assert all(model() is None for model in self.models), "a model stays in memory"
        self.models.append(weakref.ref(engine.model))


def train(folder: Path, name: str, legs: Sequence[Sequence[str]], kill: int | None = None) -> None:
    """A run in some starts, each with words of its own. kill: in this step of the first start."""
    environment = LaunchEnvironment.from_variables(os.environ)
    for number, words in enumerate(legs):
        config = load_config([], [*WORDS, *words, f"run.folder={folder}", f"run.name={name}", "train.resume=auto"])
        is_killed = kill is not None and number == 0
        callbacks = [Alive(), *([Kill(kill)] if is_killed else [])]
        # Drawing it would take longer than the run.
        with mock.patch("megasparse.training.run._leave_report", return_value=""), suppress(Killed):
            pretrain(config, environment, callbacks=callbacks)
            assert not is_killed, "the run was to be killed"


def train_all(folder: Path, runs: Sequence[tuple[str, Sequence[Sequence[str]], int | None]]) -> None:
    """name, legs and killed step of each run."""
    for name, legs, kill in runs:
        try:
            train(folder, name, legs, kill)
        except Exception as error:
            raise RuntimeError(f"run {name}") from error
