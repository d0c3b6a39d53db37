"""The one place that knows about steps: says what each step is to do, and carries out topology steps.

decision = controller.begin_step(step)         # before the forward passes of optimizer step `step`
...                                            # forward and backward, decision.patterns in force
report = controller.update_topology(access)    # if decision.changes_topology, between backward and step
multipliers = controller.lr_multipliers()      # for the optimizer step itself
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megasparse.config.loader import ConfigError
from megasparse.config.schema import Pattern, Phase, RunConfig
from megasparse.sparsity.distribution import LayerShape, layer_densities, unit_target
from megasparse.sparsity.evolution import StepCounts, random_topology, step_counts
from megasparse.sparsity.groups import LayerSettings, layer_settings
from megasparse.sparsity.schedule import PatternSchedule, build_density_schedule, is_update_due
from megasparse.sparsity.state import StateAccess
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits
from megasparse.sparsity.update import EvolvingLayer, update_layers

# Densities at which two layers must agree to share one optimizer group.
PROBES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)


class SparseLayer(Protocol):
    """What the controller needs of a linear layer."""

    weight: torch.nn.Parameter
    mask: Tensor
    unit: int
    collect_dense_gradient: bool

    def topology_changed(self) -> None: ...


@dataclass(frozen=True)
class StepDecision:
    """What one optimizer step is to do."""

    step: int
    phase: Phase
    pattern: Pattern
    patterns: list[tuple[Pattern, ...]]
    """Pattern of each query head of each layer."""
    counts: dict[str, StepCounts] = field(default_factory=dict)
    """Layers whose topology changes in this step."""
    dense_gradient_layers: frozenset[str] = frozenset()
    """Layers that need their dense weight gradient to grow by it."""

    @property
    def changes_topology(self) -> bool:
        return bool(self.counts)


@dataclass(frozen=True)
class TopologyReport:
    """One topology step, for the log. Numbers are of weights unless said otherwise."""

    step: int
    phase: Phase
    density: float
    densities: dict[str, float]
    dropped: int
    grown: int
    flip_rate: float
    ever_active: float
    dead_rows: int
    """Rows of units without a live one."""
    seconds: float


class Controller:
    """Density, topology and attention pattern of every layer over the run.

    layers: sparse layers by name, in model order. Raises ConfigError where the schedule cannot be met.
    """

    def __init__(self, config: RunConfig, layers: Mapping[str, SparseLayer]) -> None:
        self.config = config
        self.layers = dict(layers)
        self.schedule = build_density_schedule(config.sparsity)
        self.pattern_schedule = PatternSchedule(
            config.attention, config.model.num_layers, config.model.num_attention_heads
        )
        self.settings = {name: _settings(config, name) for name in self.layers}
        self.shapes = [self._shape(name) for name in self.layers]
        self.topologies = {name: Topology(name, layer.mask, layer.unit) for name, layer in self.layers.items()}
        self.num_live = {name: topology.num_units for name, topology in self.topologies.items()}
        self.ever_live = {}
        self.decision: StepDecision | None = None
        self._check()

    def start_topologies(self) -> None:
        """Give a run that starts sparse its random first topology; call before the optimizer copies the weights."""
        densities = self.densities_at(0.0)
        for name, topology in self.topologies.items():
            target = unit_target(densities[name], topology.num_units)
            if target < topology.num_units:
                floor = self.config.sparsity.row_floor and topology.unit > 1
                row_length = topology.mask.shape[1] if floor else None
                live = random_topology(
                    topology.num_units, target, stream_number(name), self.config.run.seed, row_length
                )
                self._adopt(name, live.to(topology.mask.device))
                dead = ~topology.weights_slice(0, topology.numel)
                with torch.no_grad():
                    self.layers[name].weight.view(-1).masked_fill_(dead.to(self.layers[name].weight.device), 0)
        self._remember_live()

    def begin_step(self, step: int) -> StepDecision:
        """Decide on optimizer step `step` (0-based) and tell the layers whose dense gradient is wanted."""
        progress = step / self.config.train.steps
        phase = self.schedule.phase(progress)
        pattern = self.pattern_schedule.pattern(progress, phase)
        counts = self._counts(step) if is_update_due(step, self.config.sparsity.update_interval) else {}
        dense_gradient = frozenset(name for name, count in counts.items() if self._needs_gradient(name, count))
        for name, layer in self.layers.items():
            layer.collect_dense_gradient = name in dense_gradient
        patterns = self.pattern_schedule.layer_patterns(pattern)
        self.decision = StepDecision(step, phase, pattern, patterns, counts, dense_gradient)
        return self.decision

    def update_topology(self, access: StateAccess) -> TopologyReport:
        """Carry out the topology step that ``begin_step`` announced: choose units, edit the state, tell the layers.

        After it, weights and moments are exactly 0 outside the new topology and at new units, and gradients are 0
        outside it. All ranks must call it.
        """
        decision = self.decision
        assert decision is not None and decision.changes_topology, "begin_step announced no topology step"
        started = time.perf_counter()
        evolving = [
            EvolvingLayer(
                topology=self.topologies[name],
                counts=count,
                stream=stream_number(name),
                drop_score=self.settings[name].drop_score,
                drop_score_lambda=self.config.sparsity.drop_score_lambda,
                row_floor=self.config.sparsity.row_floor,
            )
            for name, count in decision.counts.items()
        ]
        changes = update_layers(evolving, access, self.config.run.seed, decision.step)
        for name, count in decision.counts.items():
            self.num_live[name] = count.target
            self.layers[name].topology_changed()
        self._remember_live()
        return self._report(decision, changes, time.perf_counter() - started)

    def densities_at(self, progress: float) -> dict[str, float]:
        """Target density of each layer at a progress."""
        return self.densities_for(self.schedule.density(progress))

    def densities_for(self, density: float) -> dict[str, float]:
        """Density of each layer at a global density."""
        sparsity = self.config.sparsity
        return layer_densities(
            self.shapes, density, self.schedule.min_density, sparsity.distribution, sparsity.depth_boost
        )

    def live_densities(self) -> dict[str, float]:
        """Density of each layer now."""
        return {name: live / self.topologies[name].num_units for name, live in self.num_live.items()}

    def density(self) -> float:
        """Live weights over all weights of the sparse matrices, now; 1 where there are none."""
        total = sum(topology.numel for topology in self.topologies.values())
        live = sum(self.num_live[name] * topology.unit**2 for name, topology in self.topologies.items())
        return live / total if total else 1.0

    def density_classes(self) -> dict[tuple[float, ...], list[str]]:
        """Layers that have one density all along, and so may share one optimizer group."""
        probes = [self.densities_for(max(probe, self.schedule.min_density)) for probe in PROBES]
        classes: dict[tuple[float, ...], list[str]] = {}
        for name, topology in self.topologies.items():
            targets = (unit_target(probe[name], topology.num_units) / topology.num_units for probe in probes)
            classes.setdefault(tuple(targets), []).append(name)
        return classes

    def lr_multiplier(self, name: str) -> float:
        """min(density^-p, cap) of one layer at its present density; its weight decay is divided by the same."""
        sparsity = self.config.sparsity
        density = self.num_live[name] / self.topologies[name].num_units
        return min(density**-sparsity.lr_density_power, sparsity.lr_density_cap)

    def state(self) -> dict[str, Tensor]:
        """Topologies as packed bits, one tensor per layer and kind, the same on every rank."""
        masks = {f"live/{name}": pack_bits(topology.mask) for name, topology in self.topologies.items()}
        return masks | {f"ever/{name}": bits.clone() for name, bits in self.ever_live.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take topologies from ``state``. Raises ValueError naming a layer that is missing or of another shape."""
        expected = {f"{kind}/{name}" for kind in ("live", "ever") for name in self.topologies}
        if set(state) != expected:
            odd = sorted(set(state) ^ expected)
            raise ValueError(f"saved topology is of another model or setting: layers differ at {', '.join(odd[:4])}")
        for name, topology in self.topologies.items():
            try:
                live = unpack_bits(state[f"live/{name}"], topology.num_units)
                unpack_bits(state[f"ever/{name}"], topology.num_units)
            except ValueError as error:
                raise ValueError(f"saved topology of layer {name}: {error}") from None
            self._adopt(name, live.to(topology.mask.device))
            self.ever_live[name] = state[f"ever/{name}"].clone()

    def _shape(self, name: str) -> LayerShape:
        layer = self.layers[name]
        rows, columns = (size * layer.unit for size in layer.mask.shape)
        parts = name.split(".")
        depth = None
        if parts[0] == "layers":
            depth = int(parts[1]) / max(self.config.model.num_layers - 1, 1)
        return LayerShape(name, rows, columns, depth, self.settings[name].min_density)

    def _counts(self, step: int) -> dict[str, StepCounts]:
        """Counts of the layers that change in this step."""
        progress = step / self.config.train.steps
        decay = self._drop_decay(progress)
        densities = self.densities_at(progress)
        result = {}
        for name, topology in self.topologies.items():
            target = unit_target(densities[name], topology.num_units)
            settings = self.settings[name]
            share = settings.drop_fraction * decay
            count = step_counts(self.num_live[name], target, topology.num_units, share, settings.gradient_share)
            if count.keep < count.live or count.target > count.live:
                result[name] = count
        return result

    def _drop_decay(self, progress: float) -> float:
        """zeta_t / zeta = (1 + cos(pi progress)) / 2, progress over the run or over the phase."""
        anneal = self.config.sparsity.drop_anneal
        if anneal == "none":
            return 1.0
        covered = progress if anneal == "run" else self.schedule.phase_progress(progress)
        return (1 + math.cos(math.pi * covered)) / 2

    def _needs_gradient(self, name: str, count: StepCounts) -> bool:
        return count.by_gradient > 0 or self.settings[name].drop_score != "magnitude"

    def _adopt(self, name: str, live: Tensor) -> None:
        topology = self.topologies[name]
        topology.replace(live)
        self.num_live[name] = topology.num_live()
        self.layers[name].topology_changed()

    def _remember_live(self) -> None:
        for name, topology in self.topologies.items():
            bits = pack_bits(topology.mask)
            self.ever_live[name] = bits | self.ever_live[name] if name in self.ever_live else bits

    def _report(self, decision: StepDecision, changes: Mapping[str, tuple[int, int]], seconds: float) -> TopologyReport:
        size = {name: self.topologies[name].unit ** 2 for name in self.topologies}
        dropped = sum(died * size[name] for name, (_, died) in changes.items())
        grown = sum(born * size[name] for name, (born, _) in changes.items())
        live = sum(self.num_live[name] * size[name] for name in self.topologies)
        ever = sum(
            int(unpack_bits(bits, self.topologies[name].num_units).sum()) * size[name]
            for name, bits in self.ever_live.items()
        )
        return TopologyReport(
            step=decision.step,
            phase=decision.phase,
            density=self.density(),
            densities=self.live_densities(),
            dropped=dropped,
            grown=grown,
            flip_rate=min(dropped, grown) / live,
            ever_active=ever / sum(topology.numel for topology in self.topologies.values()),
            dead_rows=sum(topology.dead_rows() for topology in self.topologies.values()),
            seconds=seconds,
        )

    def _check(self) -> None:
        """Refuse a schedule that this model and number of steps cannot meet."""
        sparsity, steps = self.config.sparsity, self.config.train.steps
        last_update = (steps - 1) // sparsity.update_interval * sparsity.update_interval
        if self.layers and last_update == 0 and self.schedule.min_density < self.schedule.density(0.0):
            raise ConfigError(
                f"sparsity.update_interval: {sparsity.update_interval} leaves no topology step in train.steps {steps}, "
                f"so the model would stay dense; legal values: below {steps}, or sparsity.algorithm dense"
            )
        ends_dense = self.schedule.density(1.0) >= 1.0
        if ends_dense and self.layers and self.schedule.density(last_update / steps) < 1.0:
            largest = self._largest_interval(steps)
            legal = f"such as {largest}" if largest else "none, unless the restoration ends before the last step"
            raise ConfigError(
                f"sparsity.update_interval: {sparsity.update_interval} leaves no topology step between the end of the "
                f"restoration and train.steps {steps}, so the model would not become dense again; legal values: {legal}"
            )
        if sparsity.row_floor:
            self._check_row_floor()

    def _largest_interval(self, steps: int) -> int:
        """Largest update interval with a topology step at full density."""
        full = next(step for step in range(1, steps + 1) if self.schedule.density(step / steps) >= 1.0)
        return max((n for n in range(1, steps) if (steps - 1) // n * n >= full), default=0)

    def _check_row_floor(self) -> None:
        densities = self.densities_for(self.schedule.min_density)
        for name, topology in self.topologies.items():
            if topology.unit > 1 and unit_target(densities[name], topology.num_units) < topology.mask.shape[0]:
                raise ConfigError(
                    f"sparsity.row_floor: layer {name} has {topology.mask.shape[0]} rows of blocks and at density "
                    f"{densities[name]:.3g} only {unit_target(densities[name], topology.num_units)} live blocks; "
                    f"legal values: false, or a density of at least {1 / topology.mask.shape[1]:.3g}"
                )


def stream_number(name: str) -> int:
    """Number of the random stream of a layer: its name's checksum, so that other layers do not move it."""
    return zlib.crc32(name.encode())


def _settings(config: RunConfig, name: str) -> LayerSettings:
    settings = layer_settings(config.sparsity, name)
    assert settings is not None, f"{name} is not a sparse layer"
    return settings


def check_invariant(topologies: Sequence[Topology], access: StateAccess) -> None:
    """Raise RuntimeError naming the first layer whose weights or moments are not 0 outside its topology.

    Ages of dead weights count on; they begin anew at birth.
    """
    fragments = access.fragments()
    for topology in topologies:
        fragment = fragments.get(topology.name)
        if fragment is None:
            continue
        dead = ~topology.weights_slice(fragment.start, fragment.numel)
        moments = {label: tensor for label, tensor in fragment.moments.items() if label != "age"}
        for label, tensor in {"weight": fragment.master, **moments}.items():
            wrong = int(tensor[dead].count_nonzero())
            if wrong:
                raise RuntimeError(f"{wrong} dead entries of {label} of layer {topology.name} are not 0")
