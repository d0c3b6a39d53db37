"""Trains tiny models with the real engine and controller, for the tests that compare; runs on every rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path

import deepspeed
import torch
from topology_digest import digest
from torch import Tensor

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.engine.fragments import state_access
from megasparse.engine.training_engine import TrainingEngine
from megasparse.launching import LaunchEnvironment
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.parallel.mesh import make_mesh
from megasparse.sparsity.checks import check_invariant
from megasparse.sparsity.controller import Controller
from megasparse.training.build_engine import RunStorage, build_engine
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.state import TrainState

GLOBAL_BATCH = 8

BASE = [
    "run.name=data-0",
    "model.num_layers=2",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "model.vocab_size=64",
    # The gradient of key biases is zero but for rounding, which Adam would blow up to full steps.
    "model.bias=false",
    "optimizer.epsilon=1e-6",
    # All heads `full` throughout: the attention patterns have their own tests.
    "attention.phases={}",
    f"train.global_batch_size={GLOBAL_BATCH}",
    "train.steps=24",
    "train.precision=fp32",
    "optimizer.lr=0.003",
    # Below the norms of these runs, so that every step is clipped.
    "optimizer.gradient_clipping=0.25",
    "sparsity.update_interval=3",
    "sparsity.warmup_end=0.3",
    "sparsity.restoration_start=0.5",
    "sparsity.restoration_end=0.8",
]


@dataclass(frozen=True)
class Layout:
    """How a run lies on its ranks."""

    data: int = 1
    tensor: int = 1
    zero: int = 1
    accumulation: int = 1

    @property
    def world_size(self) -> int:
        return self.data * self.tensor

    def __str__(self) -> str:
        return f"dp{self.data}-tp{self.tensor}-zero{self.zero}-accumulation{self.accumulation}"


LAYOUTS = [
    Layout(data, tensor, zero, accumulation)
    for data in (1, 2)
    for tensor in (1, 2)
    for zero in (0, 1, 2, 3)
    for accumulation in (1, 2)
]
"""All that up to four ranks can lie in, with and without accumulation."""


def run_config(overrides: list[str], layout: Layout = Layout()) -> RunConfig:  # noqa: B008
    settings = [
        f"deepspeed.zero_stage={layout.zero}",
        f"parallel.tensor_parallel_size={layout.tensor}",
        f"train.micro_batch_size={GLOBAL_BATCH // (layout.data * layout.accumulation)}",
    ]
    if layout.zero == 3:
        # Models this small would otherwise stay whole on every rank.
        settings.append("deepspeed.extra.zero_optimization.stage3_param_persistence_threshold=0")
    return load_config([], [*BASE, *settings, *overrides])


def divided(mesh: Mesh, tensor_parallel_size: int) -> Mesh:
    """The mesh of the same processes with another tensor-parallel size."""
    environment = LaunchEnvironment.from_variables(os.environ)
    rank, world_size, timeout = environment.rank, environment.world_size, timedelta(seconds=100)
    return make_mesh(rank, world_size, mesh.device, "gloo", timeout, tensor_parallel_size, mesh.store)


def make_batches(config: RunConfig, seed: int | None = None) -> list[Tensor]:
    """One global batch per step, [global_batch_size, seq_length + 1]; low tokens are frequent, so there is
    something to learn. The seed travels as the number at the end of the run's name."""
    if seed is None:
        seed = int(config.run.name.rpartition("-")[2])
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    return [(torch.rand(shape, generator=generator) ** 3 * 64).long() for _ in range(config.train.steps)]


def build(mesh: Mesh, config: RunConfig) -> tuple[TrainingEngine, Controller]:
    storage = RunStorage.of(config, config.model.vocab_size, mesh.tensor_parallel)
    capacities = None if storage is None else storage.plan.capacities(storage.plan.at(0))
    (method,), engine = build_engine(config, config.model.vocab_size, mesh, capacities=capacities)
    return engine, method.controller


def train_step(mesh: Mesh, engine: TrainingEngine, controller: Controller, step: int, batch: Tensor) -> dict:
    """One optimizer step on this rank's part of the global batch, invariants checked."""
    config = engine.config
    decision = controller.begin_step(step)
    engine.model.set_attention_patterns(decision.patterns)
    size, total = config.train.micro_batch_size, torch.zeros((), dtype=torch.float64)
    for micro in range(engine.accumulation_steps):
        start = (micro * mesh.data_parallel.size + mesh.data_parallel.rank) * size
        part = batch[start : start + size]
        loss = engine.forward(part[:, :-1], part[:, 1:])
        engine.backward(loss)
        total += loss.detach().double() / engine.accumulation_steps
    if decision.changes_topology:
        controller.update_topology(engine.state)
    skip = decision.changes_topology and config.sparsity.skip_optimizer_on_update
    norm = engine.step(config.optimizer.lr, skip_update=skip)
    check_state(engine, controller)
    return {
        "loss": mesh.data_parallel.sum_(total) / mesh.data_parallel.size,
        "norm": norm,
        "changed": decision.changes_topology,
    }


def check_state(engine: TrainingEngine, controller: Controller) -> None:
    """Inactive entries are exactly 0 in master weights, moments and the model's own weights; the latter are the master
    rounded to the model's dtype. Raises AssertionError or RuntimeError."""
    check_invariant(list(controller.topologies.values()), engine.state, controller.slots)
    fragments = engine.state.fragments()
    for name, topology in controller.topologies.items():
        weight = model_weight(controller.layers[name].weight).reshape(-1)
        stored = controller.slots.get(name)
        active = (topology.weights_slice if stored is None else stored.active_entries)(0, weight.numel())
        assert not weight[~active].any(), f"inactive model weights of {name}"
        if name in fragments:
            fragment = fragments[name]
            mine = weight[fragment.start : fragment.start + fragment.numel]
            assert torch.equal(mine, fragment.master.to(weight.dtype)), f"model weights of {name} are stale"


def model_weight(weight: torch.nn.Parameter) -> Tensor:
    """This rank's shard of a weight as the model computes with it; put together where stage 3 keeps it in pieces."""
    with deepspeed.zero.GatheredParameters(weight):
        return weight.detach().clone()


def collected_state(mesh: Mesh, engine: TrainingEngine) -> dict[str, dict[str, Tensor]]:
    """Whole float32 master weights and moments of every parameter, put together from the pieces of all ranks."""
    parameters = dict(engine.model.named_parameters())
    access = state_access(engine._engine, engine.optimizer, parameters, mesh)
    fragments = access.fragments()
    result = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in parameters.items():
        partition = shard_spec_of(parameter)
        flat = torch.zeros(3, prod(partition.local_shape))
        if name in fragments:
            fragment = fragments[name]
            pieces = (fragment.master, fragment.moments["exp_avg"], fragment.moments["exp_avg_sq"])
            for row, piece in zip(flat, pieces, strict=True):
                row[fragment.start : fragment.start + fragment.numel] = piece
        access.shard.sum_(flat)
        shards = mesh.tensor_parallel.gather(flat)
        for number, kind in enumerate(result):
            of_ranks = [shard[number].view(partition.local_shape) for shard in shards]
            if not partition.is_divided:
                assert all(torch.equal(of_ranks[0], other) for other in of_ranks), f"{name} differs between ranks"
            result[kind][name] = partition.merge(of_ranks).clone()
    return result


def run_case(mesh: Mesh, config: RunConfig) -> dict:
    """A whole run: losses, norms, packed masks after every step, digests of all topology updates, final state."""
    engine, controller = build(mesh, config)
    losses, norms, masks, digests = [], [], [], []
    for step, batch in enumerate(make_batches(config)):
        result = train_step(mesh, engine, controller, step, batch)
        losses.append(float(result["loss"]))
        norms.append(result["norm"])
        state = controller.state()
        masks.append({name: state[f"active/{name}"] for name in controller.topologies})
        if result["changed"]:
            digests.append(digest(controller.topologies))
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masks": masks,
        "digests": digests,
        **collected_state(mesh, engine),
    }


def run_cases(mesh: Mesh, cases: list[tuple[str, list[str], Layout]]) -> dict[str, dict]:
    """Many runs in one world: (name, overrides, layout) -> result by name."""
    meshes = {size: divided(mesh, size) for size in sorted({layout.tensor for _, _, layout in cases})}
    results = {}
    for name, overrides, layout in cases:
        try:
            results[name] = run_case(meshes[layout.tensor], run_config(overrides, layout))
        except Exception as error:
            raise RuntimeError(f"case {name}") from error
    return results


def advance(mesh: Mesh, engine: TrainingEngine, controller: Controller, first: int, last: int) -> list[float]:
    """Steps `first` to `last` - 1 of the run; their losses."""
    batches = make_batches(engine.config)
    return [float(train_step(mesh, engine, controller, s, batches[s])["loss"]) for s in range(first, last)]


def run_interrupted(mesh: Mesh, config: RunConfig, folder: Path, stop: int) -> dict[str, dict]:
    """A run that saves after `stop` steps and goes on, and one that is built anew and goes on from the files."""
    engine, controller = build(mesh, config)
    advance(mesh, engine, controller, 0, stop)
    folder.parent.mkdir(parents=True, exist_ok=True)
    checkpointer = Checkpointer(folder, config, mesh, engine, engine.rules)
    checkpointer.save(TrainState(step=stop))
    checkpointer.wait_for_copy()
    # What is saved is the state of this step, although training goes on before it is written.
    outcome = {}
    for name in ("uninterrupted", "resumed"):
        if name == "resumed":
            checkpointer.finish()
            # Another seed: everything that matters must come from the files.
            other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
            engine, controller = build(mesh, other)
            engine.config = controller.config = config
            found = Checkpointer(folder, config, mesh, engine, engine.rules).restore()
            assert found.state.step == stop and not found.passed_over
            check_state(engine, controller)
        losses = advance(mesh, engine, controller, stop, config.train.steps)
        outcome[name] = {
            "losses": losses,
            "digest": digest(controller.topologies),
            "ever": {name: bits for name, bits in controller.state().items() if name.startswith("ever/")},
            "per-weight steps": {name: f.moments.get("weight_steps") for name, f in engine.state.fragments().items()},
            **collected_state(mesh, engine),
        }
    return outcome


def run_interruptions(mesh: Mesh, cases: list[tuple[str, list[str], Layout]], folder: Path) -> dict[str, dict]:
    meshes = {size: divided(mesh, size) for size in sorted({layout.tensor for _, _, layout in cases})}
    results = {}
    for name, overrides, layout in cases:
        # After step 10: ultra-sparse, between two topology updates.
        config = run_config(overrides, layout)
        # The store makes no run folder: one that is gone was deleted.
        (folder / name).mkdir(parents=True, exist_ok=True)
        results[name] = run_interrupted(meshes[layout.tensor], config, folder / name, stop=10)
    return results


def run_all(mesh: Mesh, cases: list, interruptions: list, folder: Path) -> dict[str, dict]:
    """Everything that the tests of one world size want, in one set of processes."""
    return {
        "cases": run_cases(mesh, cases),
        "interruptions": run_interruptions(mesh, interruptions, folder),
    }
