"""Runs that save, and runs in another layout that go on from what they saved; runs on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from engine_runs import build, check_state, collected_state, make_batches, run_config, train_step
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.parallel import LaunchEnvironment, Mesh
from megasparse.parallel.mesh import make_mesh
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.state import TrainState

STOP = 10
"""Steps before the checkpoint: ultra-sparse, between two topology steps."""


@dataclass(frozen=True)
class Place:
    """Where a run runs."""

    data_parallel: int = 1
    tensor_parallel: int = 1
    zero: int = 1

    @property
    def world_size(self) -> int:
        return self.data_parallel * self.tensor_parallel

    def __str__(self) -> str:
        return f"dp{self.data_parallel}-tp{self.tensor_parallel}-zero{self.zero}"


def place_config(place: Place, overrides: list[str]) -> RunConfig:
    more = [f"parallel.tensor_parallel_size={place.tensor_parallel}", "train.universal=true"]
    return run_config([*overrides, *more], place.data_parallel, place.zero)


def place_mesh(mesh: Mesh, place: Place) -> Mesh:
    environment = LaunchEnvironment.from_variables(os.environ)
    return make_mesh(environment, mesh.device, "gloo", timedelta(seconds=60), place.tensor_parallel)


def ages(mesh: Mesh, engine) -> dict[str, Tensor]:
    """Whole ages by layer name; empty where none are kept."""
    fragments = engine.state.fragments()
    result = {}
    for name, layer in engine.controller.layers.items():
        fragment = fragments.get(name)
        if engine.optimizer.keeps_ages:
            shape = getattr(layer.weight, "ds_shape", layer.weight.shape)
            whole = torch.zeros(shape.numel(), dtype=torch.int32)
            if fragment is not None:
                whole[fragment.start : fragment.start + fragment.numel] = fragment.moments["age"].int()
            result[name] = mesh.data_parallel.sum_(whole) if engine.state.is_sharded else whole
    return result


def train_on(mesh: Mesh, engine, controller, first: int, last: int) -> dict:
    """Steps `first` to `last` - 1: losses, norms, and the packed masks after each."""
    batches, losses, norms, masks = make_batches(engine.config), [], [], []
    for step in range(first, last):
        result = train_step(mesh, engine, controller, step, batches[step])
        losses.append(float(result["loss"]))
        norms.append(result["norm"])
        masks.append({name: bits for name, bits in controller.state().items()})
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masks": masks,
    }


def save_and_go_on(mesh: Mesh, place: Place, overrides: list[str], folder: Path) -> dict:
    """Train, save, collect the whole state, and train on to the end."""
    config, mesh = place_config(place, overrides), place_mesh(mesh, place)
    engine, controller = build(mesh, config)
    train_on(mesh, engine, controller, 0, STOP)
    state = TrainState(step=STOP, consumed_samples=STOP * 8, last_loss=1 / 3)
    state.window.loss = 1.0 + mesh.data_parallel.rank
    Checkpointer(folder, config, mesh, engine, controller).save(state)
    saved = {**collected_state(mesh, engine), "age": ages(mesh, engine)}
    return {"saved": saved, "rest": train_on(mesh, engine, controller, STOP, config.train.steps)}


def resume(mesh: Mesh, place: Place, overrides: list[str], folder: Path) -> dict:
    """Go on from the universal form. Another seed: everything that matters must come from the files."""
    config, mesh = place_config(place, overrides), place_mesh(mesh, place)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
    engine, controller = build(mesh, other)
    engine.config = controller.config = config
    state = Checkpointer(folder, config, mesh, engine, controller).restore()
    check_state(engine, controller)
    restored = {**collected_state(mesh, engine), "age": ages(mesh, engine)}
    return {
        "window_loss": state.window.loss,
        "state": [state.step, state.consumed_samples, state.last_loss],
        "restored": restored,
        "rest": train_on(mesh, engine, controller, STOP, config.train.steps),
    }


def run_places(mesh: Mesh, function_name: str, cases: list[tuple[str, Place, list[str], Path]]) -> dict[str, dict]:
    """Many cases in one world: (name, place, overrides, folder) -> result by name."""
    function = {"save": save_and_go_on, "resume": resume}[function_name]
    results = {}
    for name, place, overrides, folder in cases:
        try:
            results[name] = function(mesh, place, overrides, folder)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return results
