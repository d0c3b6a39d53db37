"""The one place that knows about steps: says what each step is to do, and carries out topology updates.

decision = controller.begin_step(step)         # before the forward passes of optimizer step `step`
...                                            # forward and backward, decision.patterns in force
report = controller.update_topology(access)    # if decision.changes_topology, between backward and step
multipliers = controller.lr_multipliers()      # for the optimizer step itself
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from megasparse.config.schema import Pattern, Phase, RunConfig
from megasparse.parallel import CommunicationGroup, Mesh, ShardSpec
from megasparse.sparsity.checks import check_schedule
from megasparse.sparsity.distribution import LayerShape, layer_densities, unit_target
from megasparse.sparsity.evolution import StepCounts, random_topology, step_counts
from megasparse.sparsity.groups import LayerSettings, layer_settings
from megasparse.sparsity.mask_check import check_masks, mask_digest
from megasparse.sparsity.schedule import PatternSchedule, build_density_schedule, is_update_due
from megasparse.sparsity.scores import DROP_SCORES
from megasparse.sparsity.slots import Slots
from megasparse.sparsity.state import Importance, Ranks, StateAccess
from megasparse.sparsity.statistics import LayerStatistics, collect_statistics
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits
from megasparse.sparsity.update import EvolvingLayer, update_layers

ShardCounts = Mapping[str, tuple[int, ...]]
"""Active units of each tensor-parallel shard, by layer."""
OpenWeight = Callable[[torch.nn.Parameter], AbstractContextManager]

DENSITY_TOLERANCE = 0.01
"""Relative: units are whole, and shares of layers are rounded."""

# Densities at which two layers must agree to share one optimizer group.
PROBES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)


class SparseLayer(Protocol):
    """What the controller needs of a linear layer."""

    weight: torch.nn.Parameter
    mask: Tensor
    block_size: int
    grid: ShardSpec
    collect_dense_gradient: bool

    def topology_changed(self, num_active: int | None = None) -> None: ...


class PackedSparseLayer(SparseLayer, Protocol):
    """One whose weight is its active blocks."""

    slot_blocks: Tensor

    def initial_blocks(self) -> Tensor:
        """Initial weights of the blocks in the slots, [capacity, block_size, block_size]."""
        ...


@dataclass(frozen=True)
class StepDecision:
    """What one optimizer step is to do."""

    step: int
    phase: Phase
    pattern: Pattern
    patterns: list[tuple[Pattern, ...]]
    """Pattern of each query head of each layer."""
    counts: dict[str, tuple[StepCounts, ...]] = field(default_factory=dict)
    """Layers whose topology changes in this step: counts of the layer, or of each shard that decides for itself."""
    dense_gradient_layers: frozenset[str] = frozenset()
    """Layers that need their dense weight gradient to grow by it."""

    @property
    def changes_topology(self) -> bool:
        return bool(self.counts)


@dataclass(frozen=True)
class TopologyReport:
    """One topology update, for the log. Numbers are of weights unless said otherwise."""

    step: int
    phase: Phase
    density: float
    densities: dict[str, float]
    dropped: int
    grown: int
    flip_rate: float
    ever_active: float
    inactive_rows: int
    """Rows of units without an active one."""
    imbalance: float
    """Largest over all layers of the active units of a tensor-parallel rank over their mean: 1 where no rank waits."""
    seconds: float


class Controller:
    """Density, topology and attention pattern of every layer over the run.

    layers: sparse layers by name, in model order, shards of `tensor_parallel` ranks.
    Raises ConfigError where the schedule cannot be met.
    """

    def __init__(
        self, config: RunConfig, layers: Mapping[str, SparseLayer], tensor_parallel: Ranks | None = None
    ) -> None:
        self.config, self.tensor_parallel = config, tensor_parallel or CommunicationGroup()
        self.layers = dict(layers)
        self.schedule = build_density_schedule(config.sparsity)
        self.pattern_schedule = PatternSchedule(
            config.attention, config.model.num_layers, config.model.num_attention_heads
        )
        self.settings = {name: _settings(config, name) for name in self.layers}
        self.shapes = [self._shape(name) for name in self.layers]
        self.topologies = {
            name: Topology(name, layer.mask, layer.block_size, layer.grid, self.tensor_parallel.rank)
            for name, layer in self.layers.items()
        }
        self.slots = {
            name: Slots(layer.slot_blocks, layer.block_size)
            for name, layer in self.layers.items()
            if hasattr(layer, "slot_blocks")
        }
        """Of the layers with packed storage."""
        self.shard_active = {name: (t.shard_units,) * t.num_shards for name, t in self.topologies.items()}
        self.ever_active: dict[str, Tensor] = {}
        self._kept_digests: list[int] = []
        self.decision: StepDecision | None = None
        self._last_densities: tuple[float, dict[str, float]] | None = None
        check_schedule(config, self.schedule, self.topologies, self.densities_for(self.schedule.min_density))

    @property
    def num_active(self) -> dict[str, int]:
        """Active units of each whole layer."""
        return {name: sum(shards) for name, shards in self.shard_active.items()}

    def start_topologies(self, opened: OpenWeight = nullcontext) -> None:
        """Give a run that starts sparse its random first topology, and its weights the scale of their density; call
        before the optimizer copies the weights.

        opened: context in which a weight's data is at hand (ZeRO stage 3 keeps it in pieces).
        """
        densities = self.densities_at(0.0)
        for name, topology in self.topologies.items():
            target = unit_target(densities[name], topology.num_units)
            if name in self.slots:
                self._start_packed(name, target, opened)
            elif target < topology.num_units:
                self._adopt(name, self._random_topology(name, target))
                weight, power = self.layers[name].weight, self.config.sparsity.init_density_power
                with torch.no_grad(), opened(weight):
                    inactive = ~topology.weights_slice(0, weight.numel())
                    weight.view(-1).masked_fill_(inactive.to(weight.device), 0)
                    weight.mul_(self._active_density(name) ** -power)
        self._remember_active()
        self._kept_digests = self._digests()

    def _start_packed(self, name: str, target: int, opened: OpenWeight) -> None:
        """The same for a layer with packed storage. Where its slots are too few for the beginning of the run, the state
        of a later step is loaded next: then it only gets a mask that fits."""
        layer, topology, slots = cast(PackedSparseLayer, self.layers[name]), self.topologies[name], self.slots[name]
        if target > slots.capacity * topology.num_shards:
            self._adopt(name, torch.arange(topology.num_units) < slots.capacity)
            return
        self._adopt(name, self._random_topology(name, target))
        with torch.no_grad(), opened(layer.weight):
            # At ZeRO stage 3 one rank fills in the weight for all of them.
            if layer.weight.numel():
                blocks = layer.initial_blocks() * self._active_density(name) ** -self.config.sparsity.init_density_power
                layer.weight.copy_(blocks)

    def _random_topology(self, name: str, target: int) -> Tensor:
        """A random choice of `target` units of the whole layer, bool [num_units]; balanced between shards if asked."""
        topology, seed = self.topologies[name], self.config.run.seed
        if self._is_balanced(name):
            whole = torch.zeros(topology.num_units, dtype=torch.bool)
            numbers = torch.arange(topology.num_units)
            for rank, share in enumerate(_shares(target, topology.num_shards)):
                own = topology.pick(numbers, rank)
                whole[own] = random_topology(own.numel(), share, stream_number(f"{name}/{rank}"), seed)
            return whole
        floor = self.config.sparsity.row_floor and topology.block_size > 1
        row_length = topology.whole_grid.shape[1] if floor else None
        return random_topology(topology.num_units, target, stream_number(name), seed, row_length)

    def begin_step(self, step: int, skipped_before: int = 0) -> StepDecision:
        """``decide``, and tell the layers whose dense gradient is wanted."""
        decision = self.decide(step, skipped_before)
        for name, layer in self.layers.items():
            layer.collect_dense_gradient = name in decision.dense_gradient_layers
        return decision

    def decide(self, step: int, skipped_before: int = 0) -> StepDecision:
        """Decide on optimizer step `step` (0-based); alone for plans, which visit every update of a run.

        skipped_before: steps right before it that were skipped. A topology update that one of them would have made
        is made now.
        """
        progress = step / self.config.train.steps
        phase = self.schedule.phase(progress)
        pattern = self.pattern_schedule.pattern(progress, phase)
        interval = self.config.sparsity.update_interval
        is_due = any(is_update_due(at, interval) for at in range(step - skipped_before, step + 1))
        counts = self._counts(step) if is_due else {}
        dense_gradient = frozenset(name for name, shards in counts.items() if self._needs_gradient(name, shards))
        patterns = self.pattern_schedule.layer_patterns(pattern)
        self.decision = StepDecision(step, phase, pattern, patterns, counts, dense_gradient)
        return self.decision

    def update_topology(self, access: StateAccess, importance: Importance | None = None) -> TopologyReport:
        """Carry out the topology update that ``begin_step`` announced: choose units, edit the state, tell the layers.

        After it, weights and moments are exactly 0 outside the new topology and at new units (`sparsity.regrown` says
        whether those just dropped are new), and gradients are 0 outside it. All ranks must call it.
        """
        decision = self.decision
        assert decision is not None and decision.changes_topology, "begin_step announced no topology update"
        started = time.perf_counter()
        scores = {} if importance is None else importance.scores(access)
        evolving = [
            EvolvingLayer(
                topology=self.topologies[name],
                counts=counts,
                stream=stream_number(name),
                drop_score=self.settings[name].drop_score,
                drop_score_lambda=self.config.sparsity.drop_score_lambda,
                row_floor=self.config.sparsity.row_floor,
                keep_regrown=self.config.sparsity.regrown == "keep",
                slots=self.slots.get(name),
                importance=scores.get(name),
            )
            for name, counts in decision.counts.items()
        ]
        changes = update_layers(evolving, access, self.config.run.seed, decision.step)
        if importance is not None:
            importance.compensate(access)
        self._remember_active()
        statistics = collect_statistics(self.topologies, changes, self.ever_active, self.tensor_parallel)
        for name, counts in decision.counts.items():
            self._set_active(name, statistics[name].shard_active)
            assert self.num_active[name] == sum(count.target for count in counts), f"{name}: {self.shard_active[name]}"
        self._kept_digests = self._digests()
        return self._report(decision, statistics, time.perf_counter() - started)

    def expect(self, name: str, counts: Sequence[StepCounts]) -> None:
        """Count units as a topology update will leave them, without any mask (for plans)."""
        if len(counts) > 1:
            self.shard_active[name] = tuple(count.target for count in counts)
        else:
            self.expect_active(name, counts[0].target)

    def expect_active(self, name: str, num_active: int) -> None:
        """Count so many active units of a layer, evenly spread, without any mask (for plans)."""
        self.shard_active[name] = _shares(num_active, self.topologies[name].num_shards)

    def densities_at(self, progress: float) -> dict[str, float]:
        """Target density of each layer at a progress."""
        return self.densities_for(self.schedule.density(progress))

    def densities_for(self, density: float) -> dict[str, float]:
        """Density of each layer at a global density."""
        sparsity = self.config.sparsity
        if self._last_densities is None or self._last_densities[0] != density:
            densities = layer_densities(
                self.shapes, density, self.schedule.min_density, sparsity.distribution, sparsity.depth_boost
            )
            self._last_densities = density, densities
        return dict(self._last_densities[1])

    def active_densities(self) -> dict[str, float]:
        """Density of each layer now."""
        return {name: self._active_density(name) for name in self.topologies}

    def density(self) -> float:
        """Active weights over all weights of the sparse matrices, now; 1 where there are none."""
        total = sum(topology.numel for topology in self.topologies.values())
        return self._active_weights() / total if total else 1.0

    def density_classes(self) -> dict[tuple[float, ...], list[str]]:
        """Layers that have one density all along, and so may share one optimizer group."""
        probes = [self.densities_for(max(probe, self.schedule.min_density)) for probe in PROBES]
        classes: dict[tuple[float, ...], list[str]] = {}
        for name, topology in self.topologies.items():
            targets = (unit_target(probe[name], topology.num_units) / topology.num_units for probe in probes)
            classes.setdefault(tuple(targets), []).append(name)
        return classes

    def start_density(self) -> float:
        """Density that the schedule starts at in whole units: those of small layers are far apart. 1 without layers."""
        densities, topologies = self.densities_at(0.0), self.topologies
        active = sum(unit_target(densities[name], t.num_units) * t.block_size**2 for name, t in topologies.items())
        return active / sum(t.numel for t in topologies.values()) if topologies else 1.0

    def starts_at(self, density: float) -> bool:
        """Whether it is the density that the schedule starts at, as it says or in whole units of each layer."""
        starts = (self.schedule.density(0.0), self.start_density())
        return any(abs(density - start) <= DENSITY_TOLERANCE * start for start in starts)

    def lr_multiplier(self, *names: str) -> float:
        """min(density^-p, cap) at the present density of layers that share a schedule; their weight decay is divided by
        the same. Where a model folder's topology gave them different densities it is that of all of them together."""
        power, cap = self.config.lr_density_rule
        weights = [(sum(self.shard_active[name]), self.topologies[name]) for name in names]
        active = sum(units * topology.block_size**2 for units, topology in weights)
        return min((active / sum(topology.numel for _, topology in weights)) ** -power, cap)

    def state(self) -> dict[str, Tensor]:
        """Topologies as packed bits of the whole layers, one tensor per layer and kind, the same for every layout.

        All ranks must call it and get the same.
        """
        kinds = {
            "active": {name: topology.mask for name, topology in self.topologies.items()},
            "ever": {
                name: unpack_bits(bits, self.topologies[name].shard_units) for name, bits in self.ever_active.items()
            },
        }
        return {
            f"{kind}/{name}": self._whole_bits(self.topologies[name], mask)
            for kind, masks in kinds.items()
            for name, mask in masks.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take topologies from ``state``. Raises ValueError naming a layer that is missing or of another shape."""
        expected = {f"{kind}/{name}" for kind in ("active", "ever") for name in self.topologies}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise ValueError(f"saved topology is of another model or setting: layers differ at {', '.join(odd[:4])}")
        for name, topology in self.topologies.items():
            try:
                active = unpack_bits(state[f"active/{name}"], topology.num_units)
                ever = unpack_bits(state[f"ever/{name}"], topology.num_units)
            except ValueError as error:
                raise ValueError(f"saved topology of layer {name}: {error}") from None
            self._adopt(name, active)
            self.ever_active[name] = pack_bits(topology.pick(ever))
        self._kept_digests = self._digests()

    def count_active(self, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """Active units of each shard of each layer in what ``state`` gave. Raises ValueError as ``load_state`` does."""
        found = {}
        for name, topology in self.topologies.items():
            if f"active/{name}" not in state:
                raise ValueError(f"saved topology is of another model or setting: layer {name} is missing")
            found[name] = _shard_counts(topology, unpack_bits(state[f"active/{name}"], topology.num_units))
        return found

    def check_masks(self, mesh: Mesh) -> None:
        """Raise MaskError, on all ranks alike, where the masks of this or another rank are not those of the last
        topology update, or differ between replicas. Before a change or a save, which would hide it or make it last."""
        check_masks(list(self.topologies), self._digests(), self._kept_digests, mesh)

    def whole_mask(self, name: str) -> Tensor:
        """The mask of a whole layer on its unit grid, bool on the CPU; all tensor-parallel ranks must call it."""
        topology = self.topologies[name]
        bits = self._whole_bits(topology, topology.mask)
        return unpack_bits(bits, topology.num_units).view(topology.whole_grid.shape)

    def _whole_bits(self, topology: Topology, mask: Tensor) -> Tensor:
        """Packed bits of the whole layer from this shard's mask: shards do not overlap, so that adding joins them."""
        bits = pack_bits(topology.spread(mask))
        if topology.num_shards == 1:
            return bits
        return self.tensor_parallel.sum_(bits.to(topology.mask.device)).cpu()

    def _digests(self) -> list[int]:
        return [mask_digest(topology, self.ever_active[name]) for name, topology in self.topologies.items()]

    def _shape(self, name: str) -> LayerShape:
        layer = self.layers[name]
        rows, columns = (size * layer.block_size for size in layer.grid.shape)
        parts = name.split(".")
        depth = None
        if parts[0] == "layers":
            depth = int(parts[1]) / max(self.config.model.num_layers - 1, 1)
        return LayerShape(name, rows, columns, depth, self.settings[name].min_density)

    def _counts(self, step: int) -> dict[str, tuple[StepCounts, ...]]:
        """Counts of the layers that change in this step."""
        progress = step / self.config.train.steps
        decay = self._drop_decay(progress)
        densities, num_active = self.densities_at(progress), self.num_active
        stays = self._density_stays(progress)
        result = {}
        for name, topology in self.topologies.items():
            if stays and self.settings[name].drop_fraction == 0:
                continue
            target, settings = unit_target(densities[name], topology.num_units), self.settings[name]
            share = settings.drop_fraction * decay
            if self._is_balanced(name):
                parts = zip(self.shard_active[name], _shares(target, topology.num_shards), strict=True)
                counts = tuple(
                    step_counts(active, wanted, topology.shard_units, share, settings.gradient_share)
                    for active, wanted in parts
                )
            else:
                active = num_active[name]
                counts = (step_counts(active, target, topology.num_units, share, settings.gradient_share),)
            if any(count.keep < count.active or count.target > count.active for count in counts):
                result[name] = counts
        return result

    def _density_stays(self, progress: float) -> bool:
        """Whether the model has the density that the run began with, and is to have it. Masks that do not evolve then
        stay as they are: those of a model folder may lie otherwise over the layers than the schedule would have it."""
        is_asked = self.schedule.density(progress) == self.schedule.density(0.0)
        return is_asked and self.starts_at(self.density())

    def _is_balanced(self, name: str) -> bool:
        """Whether each tensor-parallel shard of the layer keeps its own equal share of the active units."""
        return self.config.sparsity.balance_shards and self.topologies[name].num_shards > 1

    def _drop_decay(self, progress: float) -> float:
        """zeta_t / zeta = (1 + cos(pi progress)) / 2, progress over the run or over the phase."""
        anneal = self.config.sparsity.drop_anneal
        if anneal == "none":
            return 1.0
        covered = progress if anneal == "run" else self.schedule.phase_progress(progress)
        return (1 + math.cos(math.pi * covered)) / 2

    def _needs_gradient(self, name: str, counts: Sequence[StepCounts]) -> bool:
        return (
            any(count.by_gradient > 0 for count in counts) or DROP_SCORES[self.settings[name].drop_score].needs_gradient
        )

    def _adopt(self, name: str, active: Tensor) -> None:
        """Take over the mask of a whole layer, bool [num_units], which every rank has."""
        topology = self.topologies[name]
        topology.replace(topology.pick(active).to(topology.mask.device))
        if name in self.slots:
            self.slots[name].follow(topology.mask)
        # Counted where the mask comes from, the host: no layer waits for the device.
        self._set_active(name, _shard_counts(topology, active))

    def _set_active(self, name: str, shard_active: tuple[int, ...]) -> None:
        self.shard_active[name] = shard_active
        topology = self.topologies[name]
        own = shard_active[topology.rank if topology.num_shards > 1 else 0]
        self.layers[name].topology_changed(num_active=own)

    def _active_density(self, name: str) -> float:
        return sum(self.shard_active[name]) / self.topologies[name].num_units

    def _active_weights(self) -> int:
        return sum(sum(self.shard_active[name]) * topology.block_size**2 for name, topology in self.topologies.items())

    def _remember_active(self) -> None:
        for name, topology in self.topologies.items():
            bits = pack_bits(topology.mask)
            self.ever_active[name] = bits | self.ever_active[name] if name in self.ever_active else bits

    def _report(
        self, decision: StepDecision, statistics: Mapping[str, LayerStatistics], seconds: float
    ) -> TopologyReport:
        size = {name: topology.block_size**2 for name, topology in self.topologies.items()}
        dropped = sum(layer.dropped * size[name] for name, layer in statistics.items())
        grown = sum(layer.grown * size[name] for name, layer in statistics.items())
        ever = sum(layer.ever_active * size[name] for name, layer in statistics.items())
        return TopologyReport(
            step=decision.step,
            phase=decision.phase,
            density=self.density(),
            densities=self.active_densities(),
            dropped=dropped,
            grown=grown,
            flip_rate=min(dropped, grown) / self._active_weights(),
            ever_active=ever / sum(topology.numel for topology in self.topologies.values()),
            inactive_rows=sum(layer.inactive_rows for layer in statistics.values()),
            imbalance=max(max(shards) * len(shards) / max(sum(shards), 1) for shards in self.shard_active.values()),
            seconds=seconds,
        )


def _shares(total: int, num_shards: int) -> tuple[int, ...]:
    """As even as whole numbers can be; the first shards get one more."""
    return tuple(total // num_shards + (rank < total % num_shards) for rank in range(num_shards))


def _shard_counts(topology: Topology, active: Tensor) -> tuple[int, ...]:
    """active: bool [num_units]."""
    return tuple(int(topology.pick(active, rank).sum()) for rank in range(topology.num_shards))


def stream_number(name: str) -> int:
    """Number of the random stream of a layer: its name's checksum, so that other layers do not move it."""
    return zlib.crc32(name.encode())


def _settings(config: RunConfig, name: str) -> LayerSettings:
    settings = layer_settings(config.sparsity, name)
    assert settings is not None, f"{name} is not a sparse layer"
    return settings
