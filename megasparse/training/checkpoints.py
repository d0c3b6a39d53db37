"""Saving and restoring a run: engine, training methods, position and random states, as one checkpoint.

``Checkpointing`` is the callback that saves where it is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasparse.checkpoint.layout import describe_layout, write_layout
from megasparse.checkpoint.store import (
    RANDOM,
    TOPOLOGY,
    CheckpointError,
    CheckpointStore,
    Manifest,
    check_model,
    layout_differences,
)
from megasparse.checkpoint.universal import UniversalReader, tool_command
from megasparse.config.schema import RunConfig
from megasparse.engine.restore import restore_state
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import Mesh
from megasparse.training.callback import Beat, Callback, Step, TrainingMethod
from megasparse.training.state import TrainState


class Checkpointer:
    """The checkpoints of one run, on every rank."""

    def __init__(
        self, folder: Path, config: RunConfig, mesh: Mesh, engine: TrainingEngine, methods: Sequence[TrainingMethod]
    ) -> None:
        self.store = CheckpointStore(folder, config.train.keep_checkpoints)
        self._config, self._mesh, self._engine, self._methods = config, mesh, engine, methods

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the finished step; every rank calls it. Returns its folder.

        Raises ReplicaMismatchError, before anything is written, where ranks hold different masks.
        """
        parts = {method.name: method.state() for method in self._methods}
        if self._mesh.is_first:
            self.store.begin(state.step)
        self._mesh.barrier()
        name = self.store.partial_name(state.step)
        # The sum of losses since the last logged step is each rank's own; all else in the state is common.
        losses = self._mesh.gather_rows(torch.tensor([state.window.loss], dtype=torch.float64))[:, 0].tolist()
        self._engine.save(self.store.folder, name, {"train_state": state.to_dict(), "window_losses": losses})
        random_states = self._mesh.gather_rows(torch.get_rng_state())
        if self._mesh.is_first:
            partial = self.store.folder / name
            for method, part in parts.items():
                save_file({key: tensor.contiguous() for key, tensor in part.items()}, partial / _file_of(method))
            save_file({"cpu": random_states}, partial / RANDOM)
            zero_stage = self._config.deepspeed.zero_stage
            write_layout(describe_layout(self._engine.model, self._engine.optimizer, self._mesh, zero_stage), partial)
        # Every rank's files must be there before the manifest counts them.
        self._mesh.barrier()
        if self._mesh.is_first:
            self.store.commit(self._manifest(state))
        self._mesh.barrier()
        return self.store.folder / self.store.name(state.step)

    def restore(self) -> TrainState | None:
        """Go on from the newest good checkpoint, or None where there is none; every rank calls it.

        Raises CheckpointError where it is of another model, or of another layout and `train.universal` is not set or
        there is no universal form of it; RuntimeError where weights contradict masks.
        """
        found = self.store.newest_good()
        if found is None:
            return None
        folder, manifest = found
        check_model(folder, manifest.model, self._config.model.model_dump(mode="json"))
        differences = layout_differences(
            manifest, self._mesh.world_size, self._mesh.tensor_parallel.size, self._config.deepspeed.zero_stage
        )
        if not differences:
            state = self._restore_same_layout(folder)
        elif self._config.train.universal:
            state = self._restore_universal(folder)
        else:
            first = "" if manifest.is_universal_only else f"{tool_command(folder)}, and then "
            raise CheckpointError(
                f"checkpoint {folder} is of another layout: {'; '.join(differences)}. To go on with this one: "
                f"{first}train.universal=true"
            )
        if state.step > self._config.train.steps:
            raise CheckpointError(
                f"checkpoint {folder} is past the end of the run: train.steps is {self._config.train.steps}; "
                f"must be at least {state.step}"
            )
        return state

    def _restore_same_layout(self, folder: Path) -> TrainState:
        """Bit for bit, from DeepSpeed's own files."""
        client_state = self._engine.load(folder.parent, folder.name)
        self._load_methods(folder, lambda name: _load(folder / _file_of(name)))
        # A copy: torch 2.13 reads a row of a larger tensor from the start of its storage, or crashes.
        torch.set_rng_state(_load(folder / RANDOM)["cpu"][self._mesh.rank].clone())
        return _train_state(client_state["train_state"], client_state["window_losses"][self._mesh.rank])

    def _restore_universal(self, folder: Path) -> TrainState:
        """To rounding, from whole tensors. Random states are not taken over: each belongs to a rank that was."""
        failure = None
        try:
            universal = UniversalReader(folder)
            # The ranks share the reading; what one of them finds stops all.
            universal.check_files(self._mesh.rank, self._mesh.world_size)
        except CheckpointError as error:
            failure = error
        if self._mesh.agree_any(failure is not None):
            raise failure or CheckpointError(f"checkpoint {folder}: another rank finds its universal form damaged")
        try:
            restore_state(self._engine, universal)
        except ValueError as error:
            raise CheckpointError(f"{universal.folder}: {error}") from error
        # The tool keeps what it knows: other methods begin anew.
        self._load_methods(universal.folder, lambda name: universal.topology() if _file_of(name) == TOPOLOGY else {})
        losses = universal.manifest.window_losses
        # They are averaged over the ranks when they are logged: each rank takes the mean of those that were.
        return _train_state(universal.manifest.train_state, sum(losses) / len(losses))

    def _load_methods(self, folder: Path, part: Callable[[str], dict[str, Tensor]]) -> None:
        try:
            for method in self._methods:
                method.load_state(part(method.name))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {folder}: {error}") from error

    def _manifest(self, state: TrainState) -> Manifest:
        return Manifest(
            step=state.step,
            world_size=self._mesh.world_size,
            zero_stage=self._config.deepspeed.zero_stage,
            tensor_parallel_size=self._mesh.tensor_parallel.size,
            model=self._config.model.model_dump(mode="json"),
        )


class Checkpointing(Callback):
    """Saves every `train.save_interval` steps, and at the end of a run that has made a step since.

    note: shows a line to the person who watches.
    """

    def __init__(
        self, checkpointer: Checkpointer, interval: int, state: TrainState, note: Callable[[str], None], beat: Beat
    ) -> None:
        self._checkpointer, self._interval, self._state = checkpointer, interval, state
        self._note, self._beat, self._saved_step = note, beat, state.step

    def after_step(self, step: Step) -> None:
        if self._interval and step.number % self._interval == 0:
            self._save()

    def end_run(self, reason: str) -> None:
        if self._saved_step != self._state.step:
            self._note(f"checkpoint {self._save().name} saved")

    def _save(self) -> Path:
        self._beat(f"step {self._state.step}: checkpoint", slow=True)
        folder = self._checkpointer.save(self._state)
        self._saved_step = self._state.step
        return folder


def _file_of(method: str) -> str:
    return f"{method}.safetensors"


def _train_state(values: dict[str, Any], window_loss: float) -> TrainState:
    state = TrainState.from_dict(values)
    state.window.loss = window_loss
    return state


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
