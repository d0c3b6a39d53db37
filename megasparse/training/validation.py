"""Validation inside the training loop: the mean loss over a fixed, evenly spaced choice of samples.

``Validation`` is the callback that does it where it is due, ``validation_loss`` the measurement itself;
``TaskMeasurement`` measures a task (section `task`) at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from megasparse.config.schema import RunConfig, TrainConfig
from megasparse.data import split_samples, target_share
from megasparse.engine.training_engine import TrainingEngine
from megasparse.evaluation.supervised_tasks import Asking, SupervisedTask
from megasparse.methods.callback import Callback, Step, TrainingMethod
from megasparse.parallel import Mesh
from megasparse.training.state import TrainState


class Validation(Callback):
    """Measures the validation loss every `train.valid_interval` steps and after the last one, for the line of metrics.

    dataset[i]: a sample of the validation data.
    """

    def __init__(
        self, config: RunConfig, engine: TrainingEngine, dataset: Sequence[np.ndarray], mesh: Mesh, state: TrainState
    ) -> None:
        self._train, self._engine, self._dataset, self._mesh, self._state = config.train, engine, dataset, mesh, state

    def release_engine(self) -> None:
        del self._engine

    def take_engine(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        self._engine = engine

    def after_step(self, step: Step) -> None:
        train = self._train
        if not is_due(train, step):
            return
        step.beat("validation", slow=True)
        loss = validation_loss(self._engine, self._dataset, train.valid_samples, train.micro_batch_size, self._mesh)
        state, best = self._state, self._state.best_val_loss
        if math.isfinite(loss):
            state.last_val_loss, state.best_val_loss = loss, loss if best is None else min(best, loss)
        else:
            state.last_val_loss = None
            step.notes.append(f"warning: step {step.number:,}: the validation loss is {loss}")
        step.metrics["val_loss"] = loss
        step.line_due = True


class TaskMeasurement(Callback):
    """How often the model is right on a task, where validation is due, for the line of metrics."""

    def __init__(
        self, config: RunConfig, engine: TrainingEngine, task: SupervisedTask, mesh: Mesh, state: TrainState
    ) -> None:
        self._train, self._engine, self._task, self._state = config.train, engine, task, state
        self._asking = Asking(config.task.batch_size, mesh.data_parallel, mesh.device)

    def release_engine(self) -> None:
        del self._engine

    def take_engine(self, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        self._engine = engine

    def after_step(self, step: Step) -> None:
        if not is_due(self._train, step):
            return
        step.beat("task", slow=True)
        state, best = self._state, self._state.best_task_accuracy
        state.last_task_accuracy = step.metrics["task_accuracy"] = None
        step.line_due = True
        try:
            results = self._engine.ask(lambda model: self._task.measure(model, self._asking))
        except ArithmeticError as error:
            step.notes.append(f"warning: step {step.number:,}: the task is not measured: {error}")
            return
        accuracy = results["accuracy"]
        state.last_task_accuracy, state.best_task_accuracy = accuracy, max(accuracy, best or 0.0)
        step.metrics["task_accuracy"] = accuracy
        step.notes.append(f"step {step.number:,}: task accuracy {accuracy:.4f}")


def is_due(train: TrainConfig, step: Step) -> bool:
    """Whether the step is followed by a validation."""
    return step.number == train.steps or bool(train.valid_interval and step.number % train.valid_interval == 0)


def validation_loss(
    engine: TrainingEngine, dataset: Sequence[np.ndarray], num_samples: int, batch_size: int, mesh: Mesh
) -> float:
    """Mean loss per token that has one, the same on all ranks. dataset[i]: a sample; every rank takes every n-th."""
    chosen = np.linspace(0, len(dataset) - 1, num=min(num_samples, len(dataset))).round().astype(int)
    ranks = mesh.data_parallel
    own = chosen[ranks.rank :: ranks.size]
    share = target_share(dataset, chosen.tolist())
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    # As many forward passes on every rank: a divided model gathers its weights in each of them.
    for start in range(0, -(-len(chosen) // ranks.size), batch_size):
        batch = own[start : start + batch_size]
        rows = np.stack([dataset[int(index)] for index in (batch if len(batch) else chosen[:1])])
        loss = engine.evaluate(*split_samples(torch.from_numpy(rows).to(mesh.device), share))
        if len(batch):
            sums += torch.stack([loss.double() * len(batch), torch.tensor(len(batch), device=mesh.device)])
    total, count = ranks.sum_(sums).tolist()
    return total / count
