"""Trains tiny models with packed storage, whose engine is built anew where capacities change; runs on every rank."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import Any

import torch
from engine_runs import BASE, Layout, check_state, divided, make_batches, run_config, train_step
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.engine.memory_state import MemoryState
from megasparse.kernels.block_sparse import unpack
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.training.build_engine import Renewal, RunStorage, build_engine, capacities_of

assert BASE
WORDS = ["sparsity.block_size=8", "model.hidden_size=32", "sparsity.density=0.2", "sparsity.capacity_change_cost=0"]


def run_case(
    mesh: Mesh, config: RunConfig, rebuilds: Collection[int] = (), looked_at: Collection[int] = ()
) -> dict[str, Any]:
    """A whole run: losses and gradient norms, packed masks after every step, capacities in every step, final state.

    rebuilds: steps before which the engine is built anew, whatever the plan says. looked_at: steps after which whole
    weights and moments are put together from all ranks.
    """
    storage = RunStorage.of(config, config.model.vocab_size, mesh.tensor_parallel)
    capacities = None if storage is None else storage.plan.capacities(storage.plan.at(0))
    methods, engine = build_engine(config, config.model.vocab_size, mesh, capacities=capacities)
    renewal = Renewal(config, config.model.vocab_size, mesh, storage)
    losses, norms, masks, held, states = [], [], [], [], {}
    for step, batch in enumerate(make_batches(config)):
        due = None if storage is None else renewal.due(engine, methods, step)
        if due is not None or step in rebuilds:
            due = capacities_of(engine) if due is None else due
            kept = renewal.keep(engine, methods)
            engine.close()
            del engine, methods
            methods, engine = renewal.build(kept, due)
            check_state(engine, methods[0].controller)
        controller = methods[0].controller
        result = train_step(mesh, engine, controller, step, batch)
        losses.append(float(result["loss"]))
        norms.append(float(result["norm"]))
        state = controller.state()
        masks.append({name: state[f"active/{name}"] for name in controller.topologies})
        held.append(sum(capacities_of(engine).values()))
        if step in looked_at:
            states[str(step)] = whole_matrices(mesh, engine)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masks": masks,
        "held": held,
        "state": matrices(engine),
        "states": states,
    }


def matrices(engine: Any) -> dict[str, Tensor]:
    """This rank's shards of master weights and moments, packed ones as matrices."""
    saved, found = MemoryState(engine), {}
    for name in saved.shapes:
        for kind in saved.kinds(name):
            shard = saved._take(name, kind)
            if name in saved._packed:
                shard = unpack(shard, saved._packed[name], saved._grids[name])
            found[f"{kind}/{name}"] = shard
    return found


def whole_matrices(mesh: Mesh, engine: Any) -> dict[str, Tensor]:
    """The same from the shards of all tensor-parallel ranks."""
    parameters, found = dict(engine.model.named_parameters()), {}
    for key, shard in matrices(engine).items():
        name = key.partition("/")[2]
        layer = engine.packed_layers.get(name)
        spec = shard_spec_of(parameters[name]) if layer is None else layer.partition
        # Gloo does not gather the small integers of step counts.
        shard = shard if shard.is_floating_point() else shard.long()
        found[key] = spec.merge(list(mesh.tensor_parallel.gather(shard.reshape(spec.local_shape)))).clone()
    return found


def run_cases(
    mesh: Mesh, cases: list[tuple[str, list[str], Layout, list[int]]], looked_at: Collection[int] = ()
) -> dict[str, dict]:
    """Many runs in one world: (name, overrides, layout, rebuilds) -> result by name. looked_at: as in ``run_case``."""
    results = {}
    for name, overrides, layout, rebuilds in cases:
        try:
            config = run_config([*WORDS, *overrides], layout)
            results[name] = run_case(divided(mesh, layout.tensor), config, rebuilds, looked_at)
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
        gc.collect()
    return results
