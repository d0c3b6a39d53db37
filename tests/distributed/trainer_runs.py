"""Whole runs of the real trainer inside one process per rank, many runs in a row: data, loop, validation, checkpoints.

They are what the entry script starts, but for the plan, the records on disk and the seconds it takes to start.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_runs import Layout, divided, run_config

from megasparse.checkpoint.store import CheckpointStore
from megasparse.config.schema import RunConfig
from megasparse.data import IndexedDatasetWriter
from megasparse.data.build import build_data
from megasparse.evaluation.supervised_tasks import SupervisedTask
from megasparse.methods.callback import Callback, no_beat
from megasparse.monitoring.console import quiet
from megasparse.objectives.objective import Objective
from megasparse.parallel import Mesh
from megasparse.training.build_engine import Renewal, RunStorage, build_engine
from megasparse.training.checkpoints import Checkpointer, Checkpointing, begin_capacities
from megasparse.training.loop import Trainer
from megasparse.training.metrics import Metrics
from megasparse.training.signals import StopSignal
from megasparse.training.state import TrainState
from megasparse.training.validation import TaskMeasurement, Validation

# What depends on the clock.
PASSING = ("tokens_per_s", "seconds")

Case = tuple[str, list[str], Layout, list[int]]
"""Name, overrides, layout, and the steps after which the run is stopped and built anew."""


@dataclass
class Lines:
    """Takes the place of the records on disk."""

    metrics_lines: list[dict[str, Any]] = field(default_factory=list)

    def metrics(self, line: dict[str, Any]) -> None:
        self.metrics_lines.append({key: value for key, value in line.items() if not key.startswith(PASSING)})

    def record(self, *_: object) -> None: ...

    def picture(self, *_: object) -> None: ...


def write_documents(prefix: Path, lengths: tuple[int, int], total: int, vocab_size: int = 64) -> Path:
    """Documents of random lengths between two bounds, `total` tokens or a few more. Each walks through the vocabulary
    in steps of its own, which its last token, 0, does not tell: whoever sees a document alone must find its step."""
    chance = random.Random(0)
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        while writer.num_tokens < total:
            first, step = chance.randrange(vocab_size), chance.randrange(1, 8)
            length = chance.randint(*lengths)
            writer.add_document([1 + (first + i * step) % (vocab_size - 1) for i in range(length - 1)] + [0])
    return prefix


def train_run(
    mesh: Mesh,
    config: RunConfig,
    folder: Path,
    objective: Objective | None = None,
    watch: Callable[[Trainer], Callback] | None = None,
    task: SupervisedTask | None = None,
) -> list[dict[str, Any]]:
    """One leg of a run, from the newest checkpoint in `folder` (where there is one) to its end; lines of metrics."""
    storage = RunStorage.of(config, config.model.vocab_size, mesh.tensor_parallel)
    capacities = begin_capacities(storage, CheckpointStore(folder / "checkpoints", 1), mesh)
    methods, engine = build_engine(config, config.model.vocab_size, mesh, objective, capacities=capacities)
    folder.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(folder / "checkpoints", config, mesh, engine, methods, storage)
    train_data, valid_data = build_data(config, config.model.vocab_size)
    lines, state = Lines(), checkpointer.restore().state or TrainState()
    callbacks = [
        *([] if valid_data is None else [Validation(config, engine, valid_data, mesh, state)]),
        *([] if task is None else [TaskMeasurement(config, engine, task, mesh, state)]),
        Metrics(config, mesh, state, lines, quiet()),
        Checkpointing(checkpointer, config.train.save_interval, state, print, no_beat),
    ]
    trainer = Trainer(config, mesh, engine, methods, train_data, state, callbacks)
    if storage is not None:
        trainer.renewal = Renewal(config, config.model.vocab_size, mesh, storage, objective)
    # The trainer alone holds them, as they may be replaced.
    del engine, methods
    if watch is not None:
        trainer.callbacks = [watch(trainer), *callbacks]
    with checkpointer, StopSignal() as stop:
        trainer.run(stop)
    return lines.metrics_lines


def run_trainers(
    mesh: Mesh, cases: list[Case], folder: Path, task: Callable[[RunConfig], SupervisedTask] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics of each case. task: what is measured in a run of this configuration."""
    results = {}
    for name, overrides, layout, stops in cases:
        own, results[name] = divided(mesh, layout.tensor), []
        try:
            for stop in [*stops, None]:
                ending = [] if stop is None else [f"train.stop_after={stop}"]
                config = run_config([*overrides, *ending], layout)
                results[name] += train_run(own, config, folder / name, task=task and task(config))
                assert results[name][-1]["step"] == (stop or config.train.steps)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return results
