"""Trains tiny models with the real engine and controller, for the tests that compare; runs on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.engine.fragments import state_access
from megasparse.engine.training_engine import TrainingEngine
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models.gpt import GPT
from megasparse.parallel import Mesh
from megasparse.sparsity.controller import Controller, check_invariant
from megasparse.sparsity.groups import layer_settings
from megasparse.sparsity.topology import digest, pack_bits

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


def run_config(overrides: list[str], world_size: int = 1, zero: int = 1, accumulation: int = 1) -> RunConfig:
    layout = [
        f"deepspeed.zero_stage={zero}",
        f"train.micro_batch_size={GLOBAL_BATCH // (world_size * accumulation)}",
    ]
    return load_config([], [*BASE, *layout, *overrides])


def make_batches(config: RunConfig, seed: int | None = None) -> list[Tensor]:
    """One global batch per step, [global_batch_size, seq_length + 1]; low tokens are frequent, so there is
    something to learn. The seed travels as the number at the end of the run's name."""
    if seed is None:
        seed = int(config.run.name.rpartition("-")[2])
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    return [(torch.rand(shape, generator=generator) ** 3 * 64).long() for _ in range(config.train.steps)]


def build(mesh: Mesh, config: RunConfig) -> tuple[TrainingEngine, Controller]:
    def sparse(name: str) -> SparseSpec | None:
        settings = layer_settings(config.sparsity, name)
        return None if settings is None else SparseSpec(settings.unit, config.sparsity.low_rank)

    model = GPT(config.model, config.attention, config.model.vocab_size, LayerFactory(sparse, seed=config.run.seed))
    controller = Controller(config, model.sparse_layers())
    controller.start_topologies()
    return TrainingEngine(model, controller, config, mesh), controller


def train_step(mesh: Mesh, engine: TrainingEngine, controller: Controller, step: int, batch: Tensor) -> dict:
    """One optimizer step on this rank's part of the global batch, invariants checked."""
    config = engine.config
    decision = controller.begin_step(step)
    engine.model.set_attention_patterns(decision.patterns)
    size, total = config.train.micro_batch_size, torch.zeros((), dtype=torch.float64)
    for micro in range(engine.accumulation_steps):
        start = (micro * mesh.world_size + mesh.rank) * size
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
        "loss": mesh.data_parallel.sum_(total) / mesh.world_size,
        "norm": norm,
        "changed": decision.changes_topology,
    }


def check_state(engine: TrainingEngine, controller: Controller) -> None:
    """Dead entries are exactly 0 in master weights, moments and the model's own weights; the latter are the master
    rounded to the model's dtype. Raises AssertionError or RuntimeError."""
    check_invariant(list(controller.topologies.values()), engine.state)
    fragments = engine.state.fragments()
    for name, topology in controller.topologies.items():
        weight = controller.layers[name].weight.detach().reshape(-1)
        assert not weight[~topology.weights_slice(0, topology.numel)].any(), f"dead model weights of {name}"
        if name in fragments:
            fragment = fragments[name]
            mine = weight[fragment.start : fragment.start + fragment.numel]
            assert torch.equal(mine, fragment.master.to(weight.dtype)), f"model weights of {name} are stale"


def collected_state(mesh: Mesh, engine: TrainingEngine) -> dict[str, dict[str, Tensor]]:
    """Whole float32 master weights and moments of every parameter, put together from the pieces of all ranks."""
    parameters = dict(engine.model.named_parameters())
    access = state_access(engine._engine, engine.optimizer, parameters, mesh)
    fragments = access.fragments()
    result = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, parameter in parameters.items():
        whole = torch.zeros(3, parameter.numel())
        if name in fragments:
            fragment = fragments[name]
            pieces = (fragment.master, fragment.moments["exp_avg"], fragment.moments["exp_avg_sq"])
            for row, piece in zip(whole, pieces, strict=True):
                row[fragment.start : fragment.start + fragment.numel] = piece
        if access.is_sharded:
            mesh.data_parallel.sum_(whole)
        for kind, row in zip(result, whole, strict=True):
            result[kind][name] = row.view(parameter.shape).clone()
    return result


def run_case(mesh: Mesh, config: RunConfig) -> dict:
    """A whole run: losses, norms, packed masks after every step, digests of all topology steps, final state."""
    engine, controller = build(mesh, config)
    losses, norms, masks, digests = [], [], [], []
    for step, batch in enumerate(make_batches(config)):
        result = train_step(mesh, engine, controller, step, batch)
        losses.append(float(result["loss"]))
        norms.append(result["norm"])
        masks.append({name: pack_bits(topology.mask) for name, topology in controller.topologies.items()})
        if result["changed"]:
            digests.append(digest(controller.topologies))
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "norms": torch.tensor(norms, dtype=torch.float64),
        "masks": masks,
        "digests": digests,
        **collected_state(mesh, engine),
    }


def run_cases(mesh: Mesh, cases: list[tuple[str, list[str], int, int]]) -> dict[str, dict]:
    """Many runs in one world: (name, overrides, ZeRO stage, accumulation) -> result by name."""
    results = {}
    for name, overrides, zero, accumulation in cases:
        config = run_config(overrides, mesh.world_size, zero, accumulation)
        try:
            results[name] = run_case(mesh, config)
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
    engine.save(folder, "saved", {"step": stop})
    topology = {name: bits.clone() for name, bits in controller.state().items()}
    outcome = {}
    for name in ("uninterrupted", "resumed"):
        if name == "resumed":
            # Another seed: everything that matters must come from the files.
            other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})})
            engine, controller = build(mesh, other)
            engine.config = controller.config = config
            assert engine.load(folder, "saved")["step"] == stop
            controller.load_state(topology)
            check_state(engine, controller)
        losses = advance(mesh, engine, controller, stop, config.train.steps)
        outcome[name] = {
            "losses": losses,
            "digest": digest(controller.topologies),
            "ever": {name: bits for name, bits in controller.state().items() if name.startswith("ever/")},
            "ages": {name: f.moments.get("age") for name, f in engine.state.fragments().items()},
            **collected_state(mesh, engine),
        }
    return outcome


def run_interruptions(mesh: Mesh, cases: list[tuple[str, list[str], int, int]], folder: Path) -> dict[str, dict]:
    results = {}
    for name, overrides, zero, accumulation in cases:
        config = run_config(overrides, mesh.world_size, zero, accumulation)
        # After step 10: ultra-sparse, between two topology steps.
        results[name] = run_interrupted(mesh, config, folder / name, stop=10)
    return results


class TrapDoor:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def load_trapped_files(mesh: Mesh, folder: Path) -> dict[str, str]:
    """Error message by file name: each file of a checkpoint in turn is exchanged for one with a trap door in it."""
    config = run_config(["model.hidden_size=64", "sparsity.unit=16"], mesh.world_size)
    engine, controller = build(mesh, config)
    advance(mesh, engine, controller, 0, 2)
    engine.save(folder, "good", {})
    messages = {}
    for path in sorted((folder / "good").glob("*.pt")):
        good = path.read_bytes()
        content = torch.load(path, weights_only=True) if "model_states" in path.name else {}
        torch.save({**content, "client": TrapDoor(str(folder / "sprung"))}, path)
        try:
            engine.load(folder, "good")
        except ValueError as error:
            messages[path.name] = str(error)
        path.write_bytes(good)
    engine.load(folder, "good")
    return messages


def run_all(mesh: Mesh, cases: list, interruptions: list, folder: Path) -> dict[str, dict]:
    """Everything that the tests of one world size want, in one set of processes."""
    return {
        "cases": run_cases(mesh, cases),
        "interruptions": run_interruptions(mesh, interruptions, folder),
        "trapped": load_trapped_files(mesh, folder / "trapped") if mesh.world_size == 1 else {},
    }
