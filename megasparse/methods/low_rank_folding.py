"""Low-rank branches that are folded into their matrices when the model has become dense (`sparsity.fold_low_rank`).

In the topology update that makes the model dense for good, W += B A, A = B = 0 with their moments, and from then on the
branch is not computed. What the model computes stays the same; moments of W are kept.

Nothing has to be saved for it: A and B are all zeros after it, and at no other time, since A begins random.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from megasparse.config.schema import RunConfig
from megasparse.layers import SparseLinear
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, shard_spec_of
from megasparse.sparsity.schedule import first_dense_step
from megasparse.sparsity.state import StateAccess, whole_vector


class LowRankFolding(TrainingMethod):
    """first_step: in which the model becomes dense."""

    name = "low_rank_folding"

    def __init__(self, layers: Mapping[str, SparseLinear], first_step: int) -> None:
        self.layers, self.first_step = layers, first_step
        self._is_folded = False
        self._engine: Engine | None = None
        self._mesh: Mesh | None = None

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh

    def begin_run(self, step: Step) -> None:
        """A run that goes on after the fold finds zeros."""
        if step.index < self.first_step:
            return
        assert self._engine is not None and self._mesh is not None
        count = torch.zeros((), dtype=torch.int64, device=self._mesh.device)
        for layer in self.layers.values():
            for fragment in self._engine.access(_sides(layer)).fragments().values():
                count += fragment.master.count_nonzero().to(count.device)
        if not int(self._mesh.world.sum_(count)):
            self._leave_out()

    def begin_step(self, step: Step) -> None:
        folded = self._is_folded if self._engine is not None else step.index > self.first_step
        step.work.low_rank_branches = not folded

    def next_change(self, index: int, steps: int) -> int:
        return min(steps, next((at for at in (self.first_step, self.first_step + 1) if at > index), steps))

    def after_backward(self, step: Step) -> None:
        """After the topology update of the same step. A step that is skipped leaves it to the next one."""
        if self._is_folded or step.index < self.first_step:
            return
        for layer in self.layers.values():
            self._fold(layer)
        self._leave_out()

    def _leave_out(self) -> None:
        for layer in self.layers.values():
            layer.leave_side_path_out()
        self._is_folded = True

    @torch.no_grad()
    def _fold(self, layer: SparseLinear) -> None:
        """All ranks call it: those that share a shard put its branch together."""
        assert self._engine is not None and self._mesh is not None
        sides = _sides(layer)
        access = self._engine.access(sides)
        inner, outer = (self._whole(access, name, side) for name, side in sides.items())
        change = (outer @ inner).view(-1)
        for fragment in self._engine.access({"weight": layer.weight}).fragments().values():
            own = change[fragment.start : fragment.start + fragment.numel]
            fragment.master.add_(own.to(fragment.master.device))
        for fragment in access.fragments().values():
            for tensor in (fragment.master, fragment.gradient, *fragment.moments.values()):
                tensor.zero_()
        access.gradients_changed(sides)

    def _whole(self, access: StateAccess, name: str, parameter: nn.Parameter) -> Tensor:
        """Master weights of this rank's tensor-parallel shard, float32."""
        shape = shard_spec_of(parameter).local_shape
        assert self._mesh is not None
        fragment = access.fragments().get(name)
        start, master = (0, None) if fragment is None else (fragment.start, fragment.master)
        return whole_vector(master, start, prod(shape), access.shard, self._mesh.device).view(shape)


def _sides(layer: SparseLinear) -> dict[str, nn.Parameter]:
    return {"A": layer.side_in, "B": layer.side_out}


def low_rank_folding(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> LowRankFolding | None:
    """None where nothing is to be folded: a dense model has no branches."""
    layers = {name: layer for name, layer in model.sparse_layers().items() if layer.low_rank}
    first_step = first_dense_step(config)
    if not config.sparsity.fold_low_rank or not layers or first_step is None:
        return None
    return LowRankFolding(layers, first_step)
