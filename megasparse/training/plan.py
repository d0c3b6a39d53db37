"""The plan of a run: every derived number, before anything is started, at any world size, on one process.

    plan = make_plan(config, world_size=16, device="cuda")

The model is built on the meta device (shapes only) and the schedule is walked through step by step, so that the plan
and the run share their arithmetic. Raises ConfigError for what cannot be trained.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.deepspeed import check_extra
from megasparse.config.schema import RunConfig
from megasparse.cost.attention_kernels import (
    attention_kernels,
    attention_warnings,
    check_attention,
    resolve_dense_fallback,
)
from megasparse.cost.layer_kernels import LayerKernels, target_device
from megasparse.cost.ledger import FlopCounter, Flops
from megasparse.cost.resources import communication_per_rank, memory_per_rank
from megasparse.data.build import open_tokenizer, vocabulary_size
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.distribution import unit_target
from megasparse.sparsity.schedule import is_update_due
from megasparse.training.initial_checks import initial_warnings

CURVE_POINTS = 60


def make_plan(
    config: RunConfig, world_size: int, device: str | None = None, *, planned_kernels: bool = True
) -> dict[str, Any]:
    """Plain numbers and strings, as printed, saved as ``plan.json`` and shown in the report.

    device: type of the device that trains; None: that of this machine. planned_kernels: kernels are not compiled, and
    the device need not be there; False: ask them.
    """
    check_run(config, world_size)
    config = resolve_dense_fallback(config, device or target_device())
    check_extra(config.deepspeed.extra)
    vocab_size = vocabulary_size(config, open_tokenizer(config))
    # Rank 0's shard: the shapes of all shards are alike.
    ranks = CommunicationGroup(0, config.parallel.tensor_parallel_size)
    with torch.device("meta"):
        model = build_model(config, vocab_size, ranks)
    controller = Controller(config, model.sparse_layers(), ranks)
    kernels = LayerKernels(config, model, device or target_device(), planned=planned_kernels)
    check_attention(config, kernels.device, planned=planned_kernels)
    train = config.train
    tokens_per_step = train.global_batch_size * config.model.seq_length
    flops, mean_density = walk_schedule(config, model, controller, kernels)
    return {
        "run": config.run.name,
        "parameters": _parameters(model, controller),
        "tokens": {"total": tokens_per_step * train.steps, "per_step": tokens_per_step},
        "steps": train.steps,
        "documents": _documents(config),
        "schedule": {
            "phases": stretches(config, controller),
            "mean_density": mean_density,
            "min_density": controller.schedule.min_density,
            "curve": [controller.schedule.density(point / CURVE_POINTS) for point in range(CURVE_POINTS + 1)],
        },
        "flops": {
            "dense": flops.dense,
            "algorithmic": flops.algorithmic,
            "executed": flops.executed,
            "ratio": flops.algorithmic / flops.dense,
        },
        "memory": memory_per_rank(config, model, world_size),
        "communication": communication_per_rank(config, model, controller, world_size),
        "parallel": {
            "world_size": world_size,
            "data_parallel_size": world_size // config.parallel.tensor_parallel_size,
            "tensor_parallel_size": config.parallel.tensor_parallel_size,
            "zero_stage": config.deepspeed.zero_stage,
            "micro_batch_size": train.micro_batch_size,
            "accumulation_steps": train.global_batch_size
            // (train.micro_batch_size * (world_size // config.parallel.tensor_parallel_size)),
        },
        "kernels": {
            "device": kernels.device,
            "block_sparse": kernels.table(controller.densities_for(controller.schedule.min_density)),
            "hybrid_attention": attention_kernels(config, kernels.device, planned=planned_kernels),
        },
        "warnings": [
            *unused_settings(config),
            *initial_warnings(config, vocab_size, controller),
            *kernels.warnings(),
            *attention_warnings(config, kernels.device, planned=planned_kernels),
        ],
    }


def walk_schedule(config: RunConfig, model: GPT, controller: Controller, kernels: LayerKernels) -> tuple[Flops, float]:
    """FLOPs of the whole run and the mean density of the sparse weights over the steps.

    Steps between two topology updates of one phase cost the same, so only the steps where something changes are
    counted.
    """
    steps, interval = config.train.steps, config.sparsity.update_interval
    counter, total, density_sum = FlopCounter(config, model, kernels), Flops(), 0.0
    sizes = {name: topology.numel for name, topology in controller.topologies.items()}
    set_active(controller, 0.0)
    # While no density changes, steps of one pattern and the same dense gradients cost the same.
    densities, costs = controller.active_densities(), {}
    step = 0
    while step < steps:
        decision = controller.begin_step(step)
        run = 1 if decision.changes_topology else _steps_alike(config, controller, step)
        kind = decision.pattern, decision.dense_gradient_layers
        if kind not in costs:
            active = sum(densities[name] * size for name, size in sizes.items())
            costs[kind] = counter.step(decision, densities), active / sum(sizes.values()) if sizes else 1.0
        cost, density = costs[kind]
        total.add(Flops(run * cost.dense, run * cost.algorithmic, run * cost.executed))
        density_sum += run * density
        if is_update_due(step, interval):
            for name, counts in decision.counts.items():
                controller.expect(name, counts)
            if any(count.active != count.target for counts in decision.counts.values() for count in counts):
                densities, costs = controller.active_densities(), {}
        step += run
    return total, density_sum / steps


def set_active(controller: Controller, progress: float) -> None:
    """Let the controller count active units as the schedule asks for at a progress, without any mask."""
    for name, density in controller.densities_at(progress).items():
        controller.expect_active(name, unit_target(density, controller.topologies[name].num_units))


def _steps_alike(config: RunConfig, controller: Controller, step: int) -> int:
    """Steps from `step` on with the same densities and attention pattern."""
    steps, interval = config.train.steps, config.sparsity.update_interval
    last = min(steps, (step // interval + 1) * interval)

    def pattern(at: int) -> str:
        phase = controller.schedule.phase(at / steps)
        return controller.pattern_schedule.pattern(at / steps, phase)

    here = pattern(step)
    return next((at for at in range(step + 1, last) if pattern(at) != here), last) - step


def _documents(config: RunConfig) -> str:
    """What tokens see of the other documents in their sample."""
    if not config.data.document_masking:
        return "not masked: tokens attend to all earlier ones of their sample"
    restart = config.data.reset_positions and config.model.position_embedding == "learned"
    return "masked: tokens attend within their document" + ("; positions begin anew with each" if restart else "")


def _parameters(model: GPT, controller: Controller) -> dict[str, int]:
    total = model.num_parameters()
    sparsifiable = sum(topology.numel for topology in controller.topologies.values())
    densities = controller.densities_for(controller.schedule.min_density)
    active = sum(
        unit_target(densities[name], topology.num_units) * topology.block_size**2
        for name, topology in controller.topologies.items()
    )
    return {"total": total, "sparsifiable": sparsifiable, "active_at_min_density": total - sparsifiable + active}


def stretches(config: RunConfig, controller: Controller) -> list[dict[str, Any]]:
    """Stretches of equal phase and attention pattern, in steps."""
    steps = config.train.steps
    edges = {0.0, 1.0}
    for segment in controller.schedule.segments:
        edges |= {segment.start, segment.end}
    for window in config.attention.windows or ():
        edges |= {window.start, window.end}
    # A step belongs to the stretch that holds at its progress step / steps.
    bounds = sorted({min(steps, -(-round(edge * steps * 1e6) // 10**6)) for edge in edges})
    phases = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        phase = controller.schedule.phase(start / steps)
        phases.append(
            {
                "name": phase,
                "start_step": start,
                "end_step": end,
                "start_density": controller.schedule.density(start / steps),
                "end_density": controller.schedule.segment(start / steps).density(end / steps),
                "pattern": controller.pattern_schedule.pattern(start / steps, phase),
            }
        )
    return phases
