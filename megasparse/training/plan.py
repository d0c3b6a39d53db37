"""The plan of a run: every derived number, before anything is started, at any world size, on one process.

    plan = make_plan(config, world_size=16, device="cuda")

The model is built on the meta device (shapes only) and the schedule is walked through step by step, so that the plan
and the run share their arithmetic. Raises ConfigError for what cannot be trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.deepspeed import check_extra
from megasparse.config.schema import RunConfig
from megasparse.config.stages import original, stages, steps_of
from megasparse.cost.attention_kernels import (
    attention_kernels,
    attention_warnings,
    check_attention,
    resolve_dense_fallback,
)
from megasparse.cost.cpu_kernels import KERNELS, cpu_kernel, cpu_kernel_obstacles
from megasparse.cost.dense_kernels import dense_kernels, dense_warnings
from megasparse.cost.layer_kernels import LayerKernels, target_device
from megasparse.cost.ledger import FlopCounter, Flops
from megasparse.cost.phase_costs import phase_costs, storage_stretches, total_bytes
from megasparse.cost.resources import communication_per_rank
from megasparse.cost.storage_choice import StorageChoice, choose_storage
from megasparse.cost.table_sources import table_warnings
from megasparse.data.build import open_tokenizer, vocabulary_size
from megasparse.data.tokenizer import Tokenizer
from megasparse.inference.sampling import check_prompt
from megasparse.layers import Linear
from megasparse.methods.callback import MethodFactory, Step, TrainingMethod
from megasparse.methods.mixed_sparsity import MixedSparsityTraining
from megasparse.methods.registry import build_methods
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.objectives.checks import distillation_warnings, teacher_bytes
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.checks import check_stacked_layers
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.distribution import unit_target
from megasparse.training.initial_checks import initial_warnings

CURVE_POINTS = 60


def make_plan(config: RunConfig, world_size: int, device: str | None = None) -> dict[str, Any]:
    """Plain numbers and strings, as printed, saved as ``plan.json`` and shown in the report.

    device: type of the device that trains; None: that of this machine. Kernels are not compiled, and the device need
    not be there.
    """
    check_run(config, world_size)
    device = device or target_device()
    config = resolve_dense_fallback(config, device)
    tokenizer = open_tokenizer(config)
    check_sample_prompt(config, tokenizer)
    vocab_size = vocabulary_size(config, tokenizer)
    config, choice = resolve_storage(config, vocab_size, world_size, device)
    return plan_run(config, vocab_size, world_size, device, choice=choice)


def resolve_storage(
    config: RunConfig, vocab_size: int, world_size: int, device: str, saved: Path | None = None
) -> tuple[RunConfig, StorageChoice | None]:
    """With `sparsity.storage` dense or packed in place of auto, and why; None: nothing was left to decide.

    Arguments: as for ``choose_storage``.
    """
    if config.sparsity.storage != "auto":
        return config, None
    choice = choose_storage(config, vocab_size, world_size, device, saved)
    return choice.applied_to(config), choice


def check_sample_prompt(config: RunConfig, tokenizer: Tokenizer | None) -> None:
    """Raise ConfigError where the sample at the end of the run could not be drawn."""
    if tokenizer is not None and config.train.sample_tokens:
        num_tokens = len(tokenizer.encode(config.train.sample_prompt))
        check_prompt("train.sample_prompt", num_tokens, config.model.seq_length)


def plan_run(
    config: RunConfig,
    vocab_size: int,
    world_size: int,
    device: str,
    methods: Sequence[MethodFactory] = (),
    *,
    planned_kernels: bool = True,
    choice: StorageChoice | None = None,
) -> dict[str, Any]:
    """``make_plan`` of a configuration that fits the ranks and in which `attention.dense_fallback` and
    `sparsity.storage` are resolved.

    methods: besides those that the configuration asks for. planned_kernels: False: ask the kernels, which are built.
    choice: how the latter was, for the plan to tell.
    """
    check_extra(config.deepspeed.extra)
    of_teacher = distillation_warnings(config, vocab_size)
    planned = plan_stages(config, vocab_size, device, methods, planned_kernels=planned_kernels)
    whole = planned[-1]
    model, made, controller, kernels = whole.model, whole.methods, whole.controller, whole.kernels
    train = config.train
    costs = phase_costs(config, vocab_size, controller, world_size, model)
    # At its peak: where least is packed, or micro-batches are largest.
    memory = max((row["memory"] for row in costs), key=lambda parts: parts["total"])
    tokens_per_step = train.global_batch_size * config.model.seq_length
    flops = Flops()
    for stage in planned:
        flops.add(stage.flops)
    return {
        "run": config.run.name,
        "parameters": {**_parameters(model, controller), "mean_active": _mean(planned, lambda stage: stage.active)},
        "tokens": {"total": tokens_per_step * train.steps, "per_step": tokens_per_step},
        "steps": train.steps,
        "documents": _documents(config),
        "schedule": {
            "phases": stretches(config, controller),
            "mean_density": _mean(planned, lambda stage: stage.density),
            "min_density": controller.schedule.min_density,
            "curve": [controller.schedule.density(point / CURVE_POINTS) for point in range(CURVE_POINTS + 1)],
        },
        "stages": [stage.facts() for stage in planned],
        "storage_choice": asdict(choice) if choice else None,
        "methods": [
            *_storage_lines(choice),
            *_stage_lines(planned),
            *(line for method in made for line in method.plan_lines()),
        ],
        "flops": {
            "dense": flops.dense,
            "algorithmic": flops.algorithmic,
            "executed": flops.executed,
            "ratio": flops.algorithmic / flops.dense,
        },
        "memory": _with_teacher(memory, config, world_size),
        "storage": storage_stretches(config, costs),
        "bytes": {"phases": costs, "total": total_bytes(costs)},
        "communication": communication_per_rank(config, model, controller, world_size),
        "parallel": _parallel(config, world_size),
        "kernels": {
            "device": device,
            "block_sparse": kernels.table(controller.densities_for(controller.schedule.min_density)),
            "dense": dense_kernels(config, model, device),
            "hybrid_attention": attention_kernels(config, device, planned=planned_kernels),
            **{name: cpu_kernel(config, name, device, planned=planned_kernels) for name in KERNELS},
        },
        "warnings": [
            *unused_settings(config),
            *_unused_phases(config, controller),
            *of_teacher,
            *initial_warnings(planned[0].config, vocab_size, planned[0].controller),
            *_kernel_warnings(config, kernels, device, planned=planned_kernels),
        ],
    }


def _unused_phases(config: RunConfig, controller: Controller) -> list[str]:
    phases = {segment.phase for segment in controller.schedule.segments}
    unused = sorted(set(config.train.micro_batch_size_by_phase) - phases)
    return [f"train.micro_batch_size_by_phase.{phase} is not used: the run has no such phase" for phase in unused]


def _kernel_warnings(config: RunConfig, kernels: LayerKernels, device: str, *, planned: bool) -> list[str]:
    """One for each reason: that there is no compiler concerns all kernels alike."""
    attention = attention_warnings(config, device, planned=planned)
    found = [*kernels.warnings(), *dense_warnings(config, device), *table_warnings(config, kernels), *attention]
    for name, reason in cpu_kernel_obstacles(config, device, planned=planned).items():
        if not any(reason in warning for warning in found):
            found.append(f"kernels.{name} auto takes torch's operators: {reason}")
    return found


@dataclass
class PlannedStage:
    """Steps [start, end) of a run, all of them but in a run that grows (section `stacking`)."""

    config: RunConfig
    model: GPT
    """Rank 0's shard, on the meta device."""
    methods: list[TrainingMethod]
    kernels: LayerKernels
    start: int
    end: int
    flops: Flops
    density: float = 1.0
    """Mean over the steps."""

    @property
    def controller(self) -> Controller:
        return next(method.controller for method in self.methods if isinstance(method, MixedSparsityTraining))

    @property
    def active(self) -> float:
        """Active parameters in the mean over its steps, embeddings included."""
        sparsifiable = sum(topology.numel for topology in self.controller.topologies.values())
        return self.model.num_parameters() - (1.0 - self.density) * sparsifiable

    def facts(self) -> dict[str, Any]:
        return {
            "num_layers": self.config.model.num_layers,
            "start_step": self.start,
            "end_step": self.end,
            "parameters": self.model.num_parameters(),
            "mean_density": self.density,
            "flops": asdict(self.flops),
        }


def plan_stages(
    config: RunConfig,
    vocab_size: int,
    device: str,
    methods: Sequence[MethodFactory] = (),
    *,
    planned_kernels: bool = True,
) -> list[PlannedStage]:
    """The stages of a run, each walked through from its first step to its last. For arguments see ``plan_run``."""
    # Rank 0's shard: the shapes of all shards are alike.
    ranks, planned = CommunicationGroup(0, config.parallel.tensor_parallel_size), list[PlannedStage]()
    for own in stages(config):
        with torch.device("meta"):
            model = build_model(own, vocab_size, ranks)
        made = build_methods(own, model, ranks, methods)
        kernels = LayerKernels(own, model, device, planned=planned_kernels)
        check_attention(own, device, planned=planned_kernels)
        stage = PlannedStage(own, model, made, kernels, *steps_of(own), Flops())
        if planned:
            names = [name for name, layer in model.named_modules() if isinstance(layer, Linear)]
            check_stacked_layers(config, names)
            small = planned[-1]
            for name in stage.controller.topologies:
                source = original(name, small.config.model.num_layers)
                stage.controller.shard_active[name] = small.controller.shard_active[source]
        stage.flops, stage.density = walk_schedule(own, model, made, kernels, stage.start, stage.end)
        planned.append(stage)
    return planned


def _mean(planned: Sequence[PlannedStage], value: Callable[[PlannedStage], float]) -> float:
    """Over the steps of a run."""
    return sum((stage.end - stage.start) * value(stage) for stage in planned) / planned[-1].end


def _storage_lines(choice: StorageChoice | None) -> list[str]:
    return [f"sparsity.storage auto takes {choice.storage}: {choice.reason}"] if choice else []


def _stage_lines(planned: Sequence[PlannedStage]) -> list[str]:
    return [
        f"{small.config.model.num_layers} layers until step {small.end:,}, then copied to "
        f"{whole.config.model.num_layers}"
        for small, whole in pairwise(planned)
    ]


def walk_schedule(
    config: RunConfig,
    model: GPT,
    methods: Sequence[TrainingMethod],
    kernels: LayerKernels,
    start: int = 0,
    end: int | None = None,
) -> tuple[Flops, float]:
    """FLOPs of steps [start, end) of a run, by default all, and the mean density of the sparse weights over them.

    methods: stand at `start` and go to `end`. Steps that cost the same, as they say, are counted once.
    """
    steps, counter, total, density_sum = config.train.steps, FlopCounter(config, model, kernels), Flops(), 0.0
    end = steps if end is None else end
    sizes = {name: layer.in_features * layer.out_features for name, layer in model.sparse_layers().items()}
    costs: dict[Any, tuple[Flops, float]] = {}
    index = start
    while index < end:
        step = Step(index)
        for method in methods:
            method.begin_step(step)
        work = step.work
        patterns = None if work.patterns is None else tuple(work.patterns)
        kind = (
            *(tuple(work.densities.values()), work.dense_gradient_layers, tuple(work.computed.items()), patterns),
            work.low_rank_branches,
        )
        if kind not in costs:
            active = sum(work.densities.get(name, 1.0) * size for name, size in sizes.items())
            costs[kind] = counter.step(work), active / sum(sizes.values()) if sizes else 1.0
        alike = min([end, *(method.next_change(index, steps) for method in methods)]) - index
        assert alike > 0, "next_change must give a later step"
        cost, density = costs[kind]
        total.add(Flops(alike * cost.dense, alike * cost.algorithmic, alike * cost.executed))
        density_sum += alike * density
        for method in methods:
            method.after_step(step)
        index += alike
    return total, density_sum / (end - start)


def _parallel(config: RunConfig, world_size: int) -> dict[str, int]:
    tensor_parallel_size, train = config.parallel.tensor_parallel_size, config.train
    data_parallel_size = world_size // tensor_parallel_size
    return {
        "world_size": world_size,
        "data_parallel_size": data_parallel_size,
        "tensor_parallel_size": tensor_parallel_size,
        "zero_stage": config.deepspeed.zero_stage,
        "micro_batch_size": train.micro_batch_size,
        "accumulation_steps": train.accumulation_steps(data_parallel_size),
    }


def _with_teacher(memory: dict[str, int], config: RunConfig, world_size: int) -> dict[str, int]:
    """``memory_per_rank``, and the weights of a teacher where there is one."""
    teacher = teacher_bytes(config, world_size)
    return memory | {"teacher": teacher, "total": memory["total"] + teacher} if teacher else memory


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
