"""Mixed Sparsity Training as a training method: the controller's decisions, carried out in a run.

It sets the attention patterns, lets the topology evolve between the backward passes and the optimizer step, gives each
sparse matrix the learning rate of its density, and keeps the masks in checkpoints. Static masks, SET, RigL, gradual
pruning and SPDF are the same with other schedules; with `sparsity.algorithm` dense only the patterns are left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import describe_changes, running_kernels
from megasparse.cost.ledger import StepWork
from megasparse.engine.optimizer import Multipliers, ParameterGroup
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.checks import check_invariant
from megasparse.sparsity.controller import Controller, OpenWeight, TopologyReport
from megasparse.sparsity.distribution import unit_target
from megasparse.sparsity.schedule import is_update_due, pattern_at
from megasparse.sparsity.storage import plan_storage
from megasparse.sparsity.topology import unpack_bits

PICTURES = 8
"""Times that a run draws its topologies, about."""


class MixedSparsityTraining(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan. Raises ConfigError for a schedule that it cannot
    meet."""

    name = "topology"

    def __init__(self, config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> None:
        self.config, self.model = config, model
        self.controller = Controller(config, model.sparse_layers(), tensor_parallel)
        self._engine: Engine | None = None
        self._mesh: Mesh | None = None
        self._report: TopologyReport | None = None
        self._kernels: dict[str, str] | None = None
        self._picture_steps = _picture_steps(config)
        set_active(self.controller, 0.0)

    def start(self, opened: OpenWeight) -> None:
        self.controller.start_topologies(opened)

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh

    def start_from(self, folder: ModelFolder) -> None:
        """With the folder's topology, where it has the density that the schedule starts at."""
        found = topology_density(folder, self.controller)
        if self.controller.topologies and is_used(found, self.controller):
            self.controller.load_state(folder.topology())

    def initial_weight(self, name: str, weight: Tensor) -> Tensor:
        """0 where the mask is; all ranks put the whole masks together from their shards."""
        parameters = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for layer_name, layer in self.controller.layers.items():
            if parameters[id(layer.weight)] == name and self.controller.active_densities()[layer_name] < 1.0:
                mask, side = self.controller.whole_mask(layer_name), layer.block_size
                blocks = weight.reshape(mask.shape[0], side, mask.shape[1], side)
                return blocks.masked_fill(~mask[:, None, :, None], 0).view(weight.shape)
        return weight

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[nn.Parameter]]]:
        """One for each class of layers that have the same density all along."""
        layers, classes = self.controller.layers, self.controller.density_classes().values()
        self._layers_of = {f"sparse.{number}": names for number, names in enumerate(classes)}
        return [
            (ParameterGroup(f"sparse.{number}", masked=True), [layers[name].weight for name in names])
            for number, names in enumerate(classes)
        ]

    def multipliers(self, group: str) -> Multipliers:
        """The learning rate times min(density^-p, cap), the weight decay divided by it."""
        multiplier = self.controller.lr_multiplier(*self._layers_of[group])
        return Multipliers(multiplier, multiplier)

    def begin_run(self, step: Step) -> None:
        """With the patterns of the last step: a run that has none left to do still samples under them."""
        schedule = self.controller.pattern_schedule
        self.model.set_attention_patterns(schedule.layer_patterns(pattern_at(self.config, step.number, schedule)))
        self._draw(step)

    def begin_step(self, step: Step) -> None:
        self._report = None
        decide = self.controller.decide if self._engine is None else self.controller.begin_step
        decision = decide(step.index, step.skipped_before)
        if self._engine is not None:
            self.model.set_attention_patterns(decision.patterns)
        step.work = StepWork(
            {**step.work.densities, **self.controller.active_densities()},
            decision.patterns,
            step.work.dense_gradient_layers | decision.dense_gradient_layers,
            step.work.computed,
        )
        step.metrics |= {"phase": decision.phase, "pattern": decision.pattern}

    def after_backward(self, step: Step) -> None:
        if self._kernels is None:
            self._kernels = running_kernels(self.model)
        decision = self.controller.decision
        assert decision is not None and self._engine is not None and self._mesh is not None
        if decision.changes_topology:
            self.controller.check_masks(self._mesh)
            self._report = self.controller.update_topology(self._engine.state, step.importance)
            step.skip_update |= self.config.sparsity.skip_optimizer_on_update

    def after_step(self, step: Step) -> None:
        if self._engine is None:
            self._expect()
        step.metrics["density"] = self.controller.density()
        if step.skipped and is_update_due(step.index, self.config.sparsity.update_interval):
            step.notes.append(f"step {step.number:,}: its topology update is made in the next step that is not skipped")
        if self._report is not None:
            step.records["topology"] = [self._record(self._report, step)]
        if step.number in self._picture_steps or step.number == self.config.train.steps:
            self._draw(step)

    def next_change(self, index: int, steps: int) -> int:
        """Steps up to the next topology update cost the same while the attention pattern stays."""
        decision, schedule = self.controller.decision, self.controller.schedule
        assert decision is not None and decision.step == index
        if decision.changes_topology:
            return index + 1
        interval = self.config.sparsity.update_interval
        last = min(steps, (index // interval + 1) * interval)

        edges = self.controller.pattern_schedule.edges(schedule)
        if not any(index <= edge * steps <= last for edge in edges):
            return last

        def pattern(at: int) -> str:
            return self.controller.pattern_schedule.pattern(at / steps, schedule.phase(at / steps))

        return next((at for at in range(index + 1, last) if pattern(at) != decision.pattern), last)

    def plan_lines(self) -> list[str]:
        """Of packed storage: how much room there is in which steps."""
        if self.config.sparsity.storage != "packed" or not self.controller.topologies:
            return []
        plan, topologies = plan_storage(self.config, self.controller), self.controller.topologies
        lines = []
        for first, end, rung in plan.stretches(self.config.train.steps):
            room, of_rank = plan.capacities(rung), {name: t.shard_units for name, t in topologies.items()}
            blocks, whole = sum(room.values()), sum(of_rank[name] for name in room)
            packed = f"{len(room)} of {len(topologies)} sparse matrices packed, room for {blocks:,} of {whole:,} blocks"
            where = f"steps {first + 1:,} to {end:,}"
            lines.append(f"storage in {where}: {packed}" if room else f"storage in {where}: dense")
        return lines

    def summary(self) -> dict[str, Any]:
        return {"final_density": self.controller.density()}

    def state(self) -> dict[str, Tensor]:
        """Raises MaskError where a rank's masks are wrong."""
        assert self._mesh is not None
        state = self.controller.state()
        # Afterwards: what flips from here on is not in it.
        self.controller.check_masks(self._mesh)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for a topology of another model."""
        self.controller.load_state(state)

    def check_state(self) -> None:
        """Inactive entries of weights and moments are exactly 0."""
        assert self._engine is not None
        check_invariant(list(self.controller.topologies.values()), self._engine.state, self.controller.slots)

    def _record(self, report: TopologyReport, step: Step) -> dict[str, Any]:
        """The line of an update; the kernels of the layers have been chosen anew with it."""
        kernels = running_kernels(self.model)
        assert self._kernels is not None
        for change in describe_changes(self._kernels, kernels):
            step.notes.append(f"step {step.number:,}: kernels: {change}")
        self._kernels = kernels
        # Counted like the metrics, by finished steps: the change belongs to the step that it ended.
        return {**asdict(report), "step": step.number, "kernels": dict(Counter(kernels.values()))}

    def _expect(self) -> None:
        """In a plan: count active units as the step's update will leave them."""
        decision = self.controller.decision
        assert decision is not None
        if is_update_due(decision.step, self.config.sparsity.update_interval):
            for name, counts in decision.counts.items():
                self.controller.expect(name, counts)

    def _draw(self, step: Step) -> None:
        """First, middle and last sparse layer; all tensor-parallel ranks take part."""
        names = list(self.controller.topologies)
        if self._engine is not None:
            for name in dict.fromkeys(names[index] for index in (0, len(names) // 2, -1)) if names else ():
                step.pictures[name] = self.controller.whole_mask(name)


def topology_density(folder: ModelFolder, controller: Controller) -> float | None:
    """Density of the folder's topology; None where it has none, or one of other layers or units: a dense run's too."""
    state, topologies = folder.topology(), controller.topologies
    if not topologies or set(state) != {f"{kind}/{name}" for kind in ("active", "ever") for name in topologies}:
        return None
    active = 0
    for name, topology in topologies.items():
        try:
            active += int(unpack_bits(state[f"active/{name}"], topology.num_units).sum()) * topology.block_size**2
        except ValueError:
            return None
    return active / sum(topology.numel for topology in topologies.values())


def is_used(found: float | None, controller: Controller) -> bool:
    """Whether a run takes over a topology of density `found`: its schedule starts there."""
    return found is not None and controller.starts_at(found)


def set_active(controller: Controller, progress: float) -> None:
    """Let the controller count active units as the schedule asks for at a progress, without any mask."""
    for name, density in controller.densities_at(progress).items():
        controller.expect_active(name, unit_target(density, controller.topologies[name].num_units))


def _picture_steps(config: RunConfig) -> set[int]:
    """Spread over the run, each just after a topology update."""
    interval = config.sparsity.update_interval
    updates = range(interval, config.train.steps, interval)
    return {step + 1 for step in updates[:: max(len(updates) // PICTURES, 1)]}
