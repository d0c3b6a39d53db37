"""The work of a run, sampled over its schedule: densities, attention patterns and FLOPs at some moments of each phase.

    shards = Shards.of(config)
    for stretch in shards.stretches(config):
        for moment in stretch.moments:
            products = moment.products(kernels)

Between its topology updates a run changes little, so a phase of changing density is sampled at SAMPLES moments
instead of being walked through step by step as ``training.plan`` does it: a second for 70 B parameters, within a
percent of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megasparse.config.schema import Pattern, RunConfig
from megasparse.config.stages import steps_of
from megasparse.cost.layer_kernels import LayerKernels, LayerShape
from megasparse.cost.ledger import FlopCounter, Flops, StepWork
from megasparse.data.build import open_tokenizer, vocabulary_size
from megasparse.layers import Linear, SparseLinear
from megasparse.methods.mixed_sparsity import set_active
from megasparse.methods.registry import build_methods
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller, StepDecision
from megasparse.sparsity.storage import StoragePlan, plan_storage
from megasparse.training.plan import stretches

SAMPLES = 8
HEAD = "head"


@dataclass(frozen=True)
class Product:
    """Layers that cost the same at a moment."""

    count: int
    shape: LayerShape
    density: float
    executed_density: float
    """1 where dense products compute them."""
    is_head: bool = False
    wants_dense_gradient: bool = False
    """On topology updates."""


@dataclass(frozen=True)
class Moment:
    """A step that stands for `steps` of them."""

    steps: float
    density: float
    """Of all sparse weights together."""
    densities: Mapping[str, float]
    """Of each sparse layer."""
    decision: StepDecision
    dense_gradient_layers: frozenset[str]
    """Layers that want their dense gradient on a topology update at this moment."""
    evolves: bool
    """Whether topology updates happen here."""
    kinds: tuple[tuple[int, str], ...]
    """Number of layers, and one of them, of the same shape and density."""

    @cached_property
    def patterns(self) -> Mapping[str, int]:
        """Query heads of all layers, by the pattern that they attend with."""
        return Counter(name for heads in self.decision.patterns for name in heads)

    def products(self, kernels: LayerKernels) -> tuple[Product, ...]:
        """The sparse layers under a layout, which decides on the kernels."""
        return tuple(
            Product(
                count,
                kernels.shapes[name],
                self.densities[name],
                kernels.executed_density(name, self.densities[name]),
                name == HEAD,
                name in self.dense_gradient_layers,
            )
            for count, name in self.kinds
        )

    def flops(self, counter: FlopCounter, update_interval: int) -> Flops:
        """Of all its steps over the global batch: one in `update_interval` is a topology update."""
        result = Flops()
        updates = self.steps / update_interval if self.evolves else 0.0
        for steps, layers in ((self.steps - updates, frozenset()), (updates, self.dense_gradient_layers)):
            cost = counter.step(StepWork(dict(self.densities), self.decision.patterns, layers))
            result.add(Flops(steps * cost.dense, steps * cost.algorithmic, steps * cost.executed))
        return result


@dataclass(frozen=True)
class Stretch:
    """Steps of one phase and attention pattern."""

    phase: str
    pattern: str
    start_step: int
    end_step: int
    moments: tuple[Moment, ...]

    @property
    def steps(self) -> int:
        return self.end_step - self.start_step


@dataclass
class Shards:
    """Rank 0's shard of a model, its controller and its schedule, on the meta device, by number of layers, which a run
    may change (section `stacking`), and tensor-parallel size."""

    vocab_size: int
    _models: dict[tuple[int, int], GPT] = field(default_factory=dict)
    _controllers: dict[tuple[int, int], Controller] = field(default_factory=dict)
    _stretches: dict[tuple[int, int], tuple[Stretch, ...]] = field(default_factory=dict)
    _storage: dict[tuple[int, int], StoragePlan] = field(default_factory=dict)
    _packed: dict[tuple[int, int, int], GPT] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> Shards:
        return cls(vocabulary_size(config, open_tokenizer(config)))

    def model(self, config: RunConfig) -> GPT:
        """Raises ConfigError where blocks do not lie whole on the ranks."""
        key = _key(config)
        if key not in self._models:
            with torch.device("meta"):
                ranks = CommunicationGroup(0, config.parallel.tensor_parallel_size)
                self._models[key] = build_model(config, self.vocab_size, ranks)
            if config.layer_tying.sources is not None:
                # Costs are those of untied layers; parameters that layers share count once.
                self._models[key].tie_layers(config.layer_tying.sources)
        return self._models[key]

    def controller(self, config: RunConfig) -> Controller:
        key = _key(config)
        if key not in self._controllers:
            layers, ranks = self.model(config).sparse_layers(), config.parallel.tensor_parallel_size
            self._controllers[key] = Controller(config, layers, CommunicationGroup(0, ranks))
        return self._controllers[key]

    def stored(self, config: RunConfig, step: int) -> GPT:
        """The model with the storage that its sparse layers have in a step (0-based), on the meta device; where an
        adapter is trained all else is frozen."""
        if config.adapter_field is not None:
            frozen = (*_key(config), 0)
            if frozen not in self._packed:
                ranks = CommunicationGroup(0, config.parallel.tensor_parallel_size)
                with torch.device("meta"):
                    self._packed[frozen] = build_model(config, self.vocab_size, ranks)
                build_methods(config, self._packed[frozen], ranks)
            return self._packed[frozen]
        if config.sparsity.storage != "packed" or not self.controller(config).topologies:
            return self.model(config)
        plan = self._storage_plan(config)
        key = (*_key(config), plan.at(step))
        if key not in self._packed:
            ranks = CommunicationGroup(0, config.parallel.tensor_parallel_size)
            with torch.device("meta"):
                self._packed[key] = build_model(config, self.vocab_size, ranks, capacities=plan.capacities(key[-1]))
        return self._packed[key]

    def settled_steps(self, config: RunConfig) -> list[int]:
        """First steps of the stretches in which storage and micro-batch stay."""
        schedule, changes = self.controller(config).schedule, [0]
        if config.sparsity.storage == "packed" and self.controller(config).topologies:
            changes += [first for first, _ in self._storage_plan(config).changes]
        return sorted({*changes, *schedule.phase_starts(config.train.steps)})

    def _storage_plan(self, config: RunConfig) -> StoragePlan:
        key = _key(config)
        if key not in self._storage:
            self._storage[key] = plan_storage(config, self.controller(config))
        return self._storage[key]

    def stretches(self, config: RunConfig) -> tuple[Stretch, ...]:
        """The phases of the run, or of the stage that it is the configuration of, sampled; micro-batch, ZeRO stage and
        recomputation have no part in them."""
        key = _key(config)
        if key not in self._stretches:
            self._stretches[key] = _sample(config, self.controller(config))
        return self._stretches[key]

    def dense_moment(self, config: RunConfig) -> Moment:
        """A step of the same model with all weights active and causal attention, for comparison."""
        model = config.model
        full: tuple[Pattern, ...] = ("full",)
        patterns = [full * model.num_attention_heads for _ in range(model.num_layers)]
        densities = dict.fromkeys(self.controller(config).topologies, 1.0)
        decision = StepDecision(0, "dense", "full", patterns)
        kinds = _kinds(self.controller(config), densities, frozenset())
        return Moment(config.train.steps, 1.0, densities, decision, frozenset(), False, kinds)


def dense_products(config: RunConfig, model: GPT) -> tuple[Product, ...]:
    """Layers that are never sparse, and low-rank branches, as products of a rank's shard; the same at every moment."""
    tokens, ranks = config.train.micro_batch_size * config.model.seq_length, config.parallel.tensor_parallel_size
    groups: Counter[tuple[LayerShape, bool]] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and not isinstance(layer, SparseLinear):
            for rows, inner, columns in layer.products(tokens):
                groups[LayerShape(1, rows, (inner, columns)), name == HEAD] += 1
        if isinstance(layer, SparseLinear) and layer.low_rank:
            widths = layer.low_rank, (layer.in_features + layer.out_features) // ranks
            groups[LayerShape(1, tokens, widths), name == HEAD] += 1
    return tuple(Product(count, shape, 1.0, 1.0, is_head) for (shape, is_head), count in groups.items())


def _key(config: RunConfig) -> tuple[int, int]:
    return config.model.num_layers, config.parallel.tensor_parallel_size


def _sample(config: RunConfig, controller: Controller) -> tuple[Stretch, ...]:
    found, (first, last) = [], steps_of(config)
    for row in stretches(config, controller):
        start, end = max(row["start_step"], first), min(row["end_step"], last)
        if start >= end:
            continue
        steps = end - start
        number = 1 if row["start_density"] == row["end_density"] else min(SAMPLES, steps)
        moments = tuple(
            _moment(config, controller, start + (n + 0.5) * steps / number, steps / number) for n in range(number)
        )
        found.append(Stretch(row["name"], row["pattern"], start, end, moments))
    return tuple(found)


def _moment(config: RunConfig, controller: Controller, step: float, steps: float) -> Moment:
    interval, total = config.sparsity.update_interval, config.train.steps
    set_active(controller, step / total)
    densities = controller.active_densities()
    progress = int(step) / total
    phase = controller.schedule.phase(progress)
    pattern = controller.pattern_schedule.pattern(progress, phase)
    decision = StepDecision(int(step), phase, pattern, controller.pattern_schedule.layer_patterns(pattern))
    # The nearest topology update.
    update = min(max(round(step / interval), 1) * interval, (total - 1) // interval * interval)
    announced = controller.begin_step(update) if update else None
    evolves = announced is not None and announced.changes_topology
    wanting = announced.dense_gradient_layers if announced and evolves else frozenset()
    kinds = _kinds(controller, densities, wanting)
    return Moment(steps, controller.density(), densities, decision, wanting, evolves, kinds)


def _kinds(
    controller: Controller, densities: Mapping[str, float], wanting: frozenset[str]
) -> tuple[tuple[int, str], ...]:
    groups: dict[tuple, list[str]] = {}
    for name, topology in controller.topologies.items():
        key = topology.block_size, tuple(topology.mask.shape), densities[name], name == HEAD, name in wanting
        groups.setdefault(key, []).append(name)
    return tuple((len(names), names[0]) for names in groups.values())
