"""Runs that start from a model folder, or born sparse: what their engines hold at the start; runs on every rank."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from engine_runs import Layout, build, check_state, divided, make_batches, model_weight, run_config, train_step
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.config.schema import RunConfig
from megasparse.engine.fragments import state_access
from megasparse.engine.training_engine import TrainingEngine
from megasparse.models.build import build_model
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.sparsity.controller import Controller
from megasparse.training.initial_weights import load_initial_weights

MODEL = ["model.hidden_size=64", "sparsity.block_size=16", "model.vocab_size=97", "model.tie_embeddings=false"]
STATIC = [*MODEL, "sparsity.algorithm=static", "sparsity.density=0.25"]

BORN_SPARSE = [*STATIC, "sparsity.init_density_power=0.5"]


def write_folder(folder: Path, overrides: list[str], topology_seed: int | None = None) -> None:
    """A model folder of random weights, with a random topology that the schedule starts at where a seed is given."""
    config = run_config(overrides)
    model = build_model(config, 97)
    controller = Controller(config, model.sparse_layers())
    if topology_seed is not None:
        run = config.run.model_copy(update={"seed": topology_seed})
        controller = Controller(config.model_copy(update={"run": run}), model.sparse_layers())
        controller.start_topologies()
    weights = dict(model.named_parameters())
    with ModelFolderWriter(folder, config, {name: torch.float32 for name in weights}) as writer:
        for name in writer.names:
            rows = writer.specs[name].shape[0]
            # Not those of the run's seed.
            writer.write(name, 1.5 * weights[name].detach()[:rows])
        if topology_seed is not None:
            writer.topology(controller.state())


def masters(mesh: Mesh, engine: TrainingEngine) -> dict[str, Tensor]:
    """Whole float32 master weights, put together from the pieces of all ranks."""
    parameters = dict(engine.model.named_parameters())
    access = state_access(engine._engine, engine.optimizer, parameters, mesh)
    fragments, result = access.fragments(), {}
    for name, parameter in parameters.items():
        partition = shard_spec_of(parameter)
        flat = torch.zeros(prod(partition.local_shape))
        if name in fragments:
            fragment = fragments[name]
            flat[fragment.start : fragment.start + fragment.numel] = fragment.master
        access.shard.sum_(flat)
        shards = [shard.view(partition.local_shape) for shard in mesh.tensor_parallel.gather(flat)]
        result[name] = partition.merge(shards).clone()
    return result


def start(mesh: Mesh, config: RunConfig) -> dict:
    engine, controller = build(mesh, config)
    if config.train.init_from is not None:
        load_initial_weights(config, engine.rules, engine)
    check_state(engine, controller)
    found = masters(mesh, engine)
    for name, parameter in engine.model.named_parameters():
        mine = shard_spec_of(parameter).shard(found[name], mesh.tensor_parallel.rank)
        assert torch.equal(model_weight(parameter), mine.to(parameter.dtype)), f"{name}: model and master differ"
    state = {name: bits.clone() for name, bits in controller.state().items()}
    steps = [train_step(mesh, engine, controller, step, batch) for step, batch in enumerate(make_batches(config)[:3])]
    return {"masters": found, "topology": state, "losses": [float(result["loss"]) for result in steps]}


def run_starts(mesh: Mesh, cases: list[tuple[str, list[str], Layout]]) -> dict[str, dict]:
    """Many cases in one world: (name, overrides, layout) -> result by name."""
    results = {}
    for name, overrides, layout in cases:
        try:
            results[name] = start(divided(mesh, layout.tensor), run_config(overrides, layout))
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return results
