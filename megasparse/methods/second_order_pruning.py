"""Second-order gradual pruning (`sparsity.algorithm: obert`): Mixed Sparsity Training's controller keeps the schedule
and chooses; this method tells it what each weight costs, and lets the others make up for those that go.

The gradients are those of the steps before a topology update that drops, averaged over the global batch as the
optimizer has them, like the sliding window of M-FAC (Frantar et al. 2021, arXiv 2107.03356): no pass is made for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.schedule import build_density_schedule, is_update_due
from megasparse.sparsity.second_order import BlockFisher
from megasparse.sparsity.state import StateAccess, StateFragment, whole_vector
from megasparse.sparsity.topology import Topology

COUNT = "gradients"


class SecondOrderPruning(TrainingMethod):
    name = "second_order"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        self.config = config
        self.topologies = {
            name: Topology(name, layer.mask, layer.block_size, layer.grid)
            for name, layer in model.sparse_layers().items()
        }
        self._schedule = build_density_schedule(config.sparsity)
        self._fishers: dict[str, BlockFisher] = {}
        self._engine: Engine | None = None
        self._is_due = self._collects = False

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, settings = engine, self.config.second_order
        self._fishers = {
            name: BlockFisher(topology, settings.fisher_block, settings.damping, engine.state.shard)
            for name, topology in self.topologies.items()
        }

    def begin_step(self, step: Step) -> None:
        interval, first = self.config.sparsity.update_interval, step.index - step.skipped_before
        self._is_due = any(is_update_due(at, interval) for at in range(first, step.index + 1))
        self._collects = not self._is_due and self._is_before_drop(step.index)
        if self._is_due:
            step.importance = self

    def after_backward(self, step: Step) -> None:
        """After the topology update of the step, where there is one: by then the sums have been used."""
        assert self._engine is not None
        if self._collects:
            self._add(self._engine.state)
        if self._is_due:
            for fisher in self._fishers.values():
                fisher.clear()

    def scores(self, access: StateAccess) -> dict[str, Tensor]:
        """Before a topology update: with the gradients of its own step."""
        self._add(access)
        fragments, found = access.fragments(), {}
        for name, fisher in self._fishers.items():
            fragment = fragments.get(name)
            whole = fisher.scores(self._whole(fisher, fragment, None if fragment is None else fragment.master))
            if fragment is not None:
                found[name] = whole[fragment.start : fragment.start + fragment.numel].clone()
        return found

    @torch.no_grad()
    def compensate(self, access: StateAccess) -> None:
        fragments = access.fragments()
        for name, fisher in self._fishers.items():
            change, fragment = fisher.compensation(), fragments.get(name)
            if fragment is not None:
                own = change[fragment.start : fragment.start + fragment.numel]
                fragment.master.add_(own.to(fragment.master.device))

    def plan_lines(self) -> list[str]:
        side, gradients = self.config.second_order.fisher_block, self.config.second_order.gradients
        blocks = sum(-(-t.shard_width // side) * (t.numel // t.shard_width) for t in self.topologies.values())
        return [
            f"second-order pruning: Fisher blocks of {side} x {side} take {4 * side**2 * blocks / 2**20:,.0f} MiB over "
            f"all ranks in up to {gradients} steps before each topology update that drops, and half of that in a "
            "checkpoint of such a step"
        ]

    def state(self) -> dict[str, Tensor]:
        """The sums between two topology updates; empty where no gradient has been added since the last one."""
        count = max((fisher.count for fisher in self._fishers.values()), default=0)
        if not count:
            return {}
        sums = {f"fisher/{name}": fisher.packed().cpu() for name, fisher in self._fishers.items()}
        return {COUNT: torch.tensor([count]), **sums}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """With nothing, where the run had another algorithm or no gradients yet, the sums begin with the next step."""
        for name, fisher in self._fishers.items():
            fisher.clear()
            if state:
                if f"fisher/{name}" not in state:
                    raise ValueError(f"saved Fisher matrices are of another model: layer {name} is missing")
                fisher.unpack(state[f"fisher/{name}"], int(state[COUNT]))

    def _is_before_drop(self, index: int) -> bool:
        """Whether the next topology update comes at most M - 1 steps later, and the density falls with it."""
        interval, steps = self.config.sparsity.update_interval, self.config.train.steps
        before = index // interval * interval
        due = before + interval
        is_near = due < steps and due - index < self.config.second_order.gradients
        return is_near and self._schedule.density(due / steps) < self._schedule.density(before / steps)

    def _add(self, access: StateAccess) -> None:
        fragments = access.fragments()
        for name, fisher in self._fishers.items():
            fragment = fragments.get(name)
            gradient = None
            if fragment is not None:
                gradient = fragment.gradient.to(torch.float32) / fragment.gradient_scale
            fisher.add(self._whole(fisher, fragment, gradient))

    @staticmethod
    def _whole(fisher: BlockFisher, fragment: StateFragment | None, values: Tensor | None) -> Tensor:
        topology, start = fisher.topology, 0 if fragment is None else fragment.start
        return whole_vector(values, start, topology.numel, fisher.ranks, topology.mask.device)


def second_order_pruning(
    config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup
) -> SecondOrderPruning | None:
    """None where it is not asked for."""
    return SecondOrderPruning(config, model) if config.sparsity.algorithm == "obert" else None
