"""Saving and restoring a run: engine, topology, position and random states, as one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasparse.checkpoint.store import (
    RANDOM,
    TOPOLOGY,
    CheckpointError,
    CheckpointStore,
    Manifest,
    check_fits,
)
from megasparse.config.schema import RunConfig
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import Mesh
from megasparse.sparsity.checks import check_invariant
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.replicas import check_replicas
from megasparse.training.state import TrainState


class Checkpointer:
    """The checkpoints of one run, on every rank."""

    def __init__(
        self, folder: Path, config: RunConfig, mesh: Mesh, engine: TrainingEngine, controller: Controller
    ) -> None:
        self.store = CheckpointStore(folder, config.train.keep_checkpoints)
        self._config, self._mesh, self._engine, self._controller = config, mesh, engine, controller

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint of the finished step; every rank calls it. Returns its folder.

        Raises ReplicaMismatchError, before anything is written, where ranks hold different masks.
        """
        check_replicas(self._controller.topologies, self._mesh)
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
            save_file({key: bits.contiguous() for key, bits in self._controller.state().items()}, partial / TOPOLOGY)
            save_file({"cpu": random_states}, partial / RANDOM)
        # Every rank's files must be there before the manifest counts them.
        self._mesh.barrier()
        if self._mesh.is_first:
            self.store.commit(self._manifest(state))
        self._mesh.barrier()
        return self.store.folder / self.store.name(state.step)

    def restore(self) -> TrainState | None:
        """Go on from the newest good checkpoint, or None where there is none.

        Raises CheckpointError where it is of another model or layout, RuntimeError where weights contradict masks.
        """
        found = self.store.newest_good()
        if found is None:
            return None
        folder, manifest = found
        check_fits(
            folder,
            manifest,
            self._config.model.model_dump(mode="json"),
            self._mesh.world_size,
            self._config.deepspeed.zero_stage,
        )
        client_state = self._engine.load(folder.parent, folder.name)
        try:
            self._controller.load_state(_load(folder / TOPOLOGY))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {folder}: {error}") from error
        # A copy: torch 2.13 reads a row of a larger tensor from the start of its storage, or crashes.
        torch.set_rng_state(_load(folder / RANDOM)["cpu"][self._mesh.rank].clone())
        check_invariant(list(self._controller.topologies.values()), self._engine.state)
        state = TrainState.from_dict(client_state["train_state"])
        if state.step > self._config.train.steps:
            raise CheckpointError(
                f"checkpoint {folder} is past the end of the run: train.steps is {self._config.train.steps}; "
                f"legal values: at least {state.step}"
            )
        state.window.loss = client_state["window_losses"][self._mesh.rank]
        return state

    def _manifest(self, state: TrainState) -> Manifest:
        return Manifest(
            step=state.step,
            world_size=self._mesh.world_size,
            zero_stage=self._config.deepspeed.zero_stage,
            model=self._config.model.model_dump(mode="json"),
        )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path}: not readable: {error}") from error
