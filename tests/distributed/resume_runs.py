"""Runs that save, and runs in another layout that go on from what they saved; runs on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from engine_runs import Layout, build, check_state, collected_state, divided, make_batches, run_config, train_step
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.sparsity.controller import Controller
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.state import TrainState

FLIPS = 12
"""Places in each file of a checkpoint at which a bit is turned over."""
STOP = 10
"""Steps before the checkpoint: ultra-sparse, between two topology updates."""


def collected_weight_steps(mesh: Mesh, engine: TrainingEngine) -> dict[str, Tensor]:
    """Whole per-weight steps by layer name; empty where none are kept."""
    fragments, result = engine.state.fragments(), {}
    for name, layer in engine.model.sparse_layers().items():
        if not engine.optimizer.keeps_weight_steps:
            continue
        partition = shard_spec_of(layer.weight)
        flat = torch.zeros(torch.Size(partition.local_shape).numel(), dtype=torch.int32)
        if name in fragments:
            fragment = fragments[name]
            flat[fragment.start : fragment.start + fragment.numel] = fragment.moments["weight_steps"].int()
        engine.state.shard.sum_(flat)
        shards = mesh.tensor_parallel.gather(flat)
        result[name] = partition.merge([shard.view(partition.local_shape) for shard in shards])
    return result


def train_on(mesh: Mesh, engine: TrainingEngine, controller: Controller, first: int, last: int) -> dict:
    """Steps `first` to `last` - 1: losses, norms, and the packed masks after each."""
    batches, losses, norms, masks = make_batches(engine.config), [], [], []
    for step in range(first, last):
        result = train_step(mesh, engine, controller, step, batches[step])
        losses.append(float(result["loss"]))
        norms.append(result["norm"])
        masks.append(controller.state())
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masks": masks,
    }


def save_and_go_on(mesh: Mesh, layout: Layout, overrides: list[str], folder: Path) -> dict:
    """Train, save, collect the whole state, and train on to the end."""
    config, mesh = run_config(overrides, layout), divided(mesh, layout.tensor)
    engine, controller = build(mesh, config)
    train_on(mesh, engine, controller, 0, STOP)
    state = TrainState(step=STOP, consumed_samples=STOP * 8, last_loss=1 / 3)
    state.window.loss = 1.0 + mesh.data_parallel.rank
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(folder, config, mesh, engine, engine.rules)
    checkpointer.save(state)
    checkpointer.finish()
    saved = {**collected_state(mesh, engine), "weight_steps": collected_weight_steps(mesh, engine)}
    return {"saved": saved, "rest": train_on(mesh, engine, controller, STOP, config.train.steps)}


def resume(mesh: Mesh, layout: Layout, overrides: list[str], folder: Path) -> dict:
    """Go on from the checkpoint. Another seed: everything that matters must come from the files."""
    config, mesh = run_config(overrides, layout), divided(mesh, layout.tensor)
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
    engine, controller = build(mesh, other)
    engine.config = controller.config = config
    state = Checkpointer(folder, config, mesh, engine, engine.rules).restore().state
    check_state(engine, controller)
    restored = {**collected_state(mesh, engine), "weight_steps": collected_weight_steps(mesh, engine)}
    return {
        "window_loss": state.window.loss,
        "state": [state.step, state.consumed_samples, state.last_loss],
        "restored": restored,
        "rest": train_on(mesh, engine, controller, STOP, config.train.steps),
    }


def collected_weights(engine: TrainingEngine) -> Tensor:
    """This rank's master weights, one after another."""
    return torch.cat([fragment.master.clone() for fragment in engine.state.fragments().values()])


def refusals(mesh: Mesh, layout: Layout, overrides: list[str], folder: Path) -> dict[str, str]:
    """Messages of the resumes that are refused; `folder` holds one checkpoint, of another layout."""
    config, mesh = run_config(overrides, layout), divided(mesh, layout.tensor)
    engine, controller = build(mesh, config)
    untouched = collected_weights(engine)

    def attempt() -> str:
        try:
            Checkpointer(folder, config, mesh, engine, engine.rules).restore()
        except CheckpointError as error:
            assert torch.equal(untouched, collected_weights(engine)), "refused, and yet something was changed"
            return str(error)
        return "accepted"

    def attempt_with(path: Path, content: bytes) -> str:
        good = path.read_bytes()
        mesh.barrier()
        if mesh.is_first:
            path.write_bytes(content)
        mesh.barrier()
        message = attempt()
        mesh.barrier()
        if mesh.is_first:
            path.write_bytes(good)
        mesh.barrier()
        return message

    messages = {}
    engine.optimizer.per_weight_step_counts = True
    messages["no per-weight steps"] = attempt()
    engine.optimizer.per_weight_step_counts = False
    (checkpoint,) = folder.glob("step-*")
    for path in sorted(checkpoint.iterdir()):
        good = path.read_bytes()
        for number, at in enumerate(range(17, len(good), len(good) // FLIPS)):
            flipped = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
            messages[f"flipped/{path.name}/{number}"] = attempt_with(path, flipped)
        messages[f"truncated/{path.name}"] = attempt_with(path, good[: len(good) // 2])
    messages["good again"] = attempt()
    return messages


def run_layouts(mesh: Mesh, function_name: str, cases: list[tuple[str, Layout, list[str], Path]]) -> dict[str, dict]:
    """Many cases in one world: (name, layout, overrides, folder) -> result by name."""
    function = {"save": save_and_go_on, "resume": resume, "refuse": refusals}[function_name]
    results = {}
    for name, layout, overrides, folder in cases:
        try:
            results[name] = function(mesh, layout, overrides, folder)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return results
