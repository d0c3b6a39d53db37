"""Admin, an initialisation of models with normalisation after the residual sum (Liu et al. 2020, arXiv 2004.08249).

Sum i of the model, in the order of depth, becomes omega_i x + f_i with omega_i^2 = 1 + Var f_1 + ... + Var f_(i-1) at
the beginning. The variances are those of the first sample of rank 0 in the first forward pass, masks applied; which
sample that is depends on no number of ranks and no size of micro-batches. Each omega is set while the pass goes on,
right before it is used, so the pass is the first one of training as well. The numbers go to all ranks. Before the
first optimizer step they enter the master weights; from then on omega is a weight as others are, in checkpoints and
model folders too, and nothing is left of the method.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.schema import RunConfig
from megasparse.layers import ResidualWeight
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh


class Admin(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan."""

    name = "admin"

    def __init__(self, model: GPT) -> None:
        # In the order of depth, as modules are entered in that order.
        self.sums = {name: part for name, part in model.named_modules() if isinstance(part, ResidualWeight)}
        self._variance = 1.0
        """Of the next sum's omega x, as x has variance 1."""
        self._is_measured = False
        self._engine: Engine | None = None
        self._mesh: Mesh | None = None

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh

    def start_from(self, folder: ModelFolder) -> None:
        """Its weights are trained ones."""
        self._is_measured = True

    def begin_step(self, step: Step) -> None:
        if self._engine is None or self._is_measured:
            return
        for part in self.sums.values():
            part.measure = self._measure
        self._is_measured = True

    def _measure(self, f_BTC: Tensor) -> float:
        """The offset of a sum with this branch; all ranks call it, in the order of depth."""
        assert self._mesh is not None
        offset = self._variance**0.5 - 1.0
        self._variance += float(self._mesh.from_first(f_BTC[0].double().var(correction=0).cpu()))
        return offset

    @torch.no_grad()
    def after_backward(self, step: Step) -> None:
        """A step that is skipped leaves it to the next one."""
        if not any(part.offset for part in self.sums.values()):
            return
        assert self._engine is not None
        fragments = self._engine.access({name: part.weight for name, part in self.sums.items()}).fragments()
        for name, fragment in fragments.items():
            fragment.master.add_(self.sums[name].offset)
        step.metrics["largest_residual_weight"] = 1.0 + max(part.offset for part in self.sums.values())
        for part in self.sums.values():
            part.offset = 0.0

    def plan_lines(self) -> list[str]:
        return ["residual sums are weighted by the variances of the first forward pass (Admin)"]

    def state(self) -> dict[str, Tensor]:
        """Whether the weights were measured, and what has not yet entered them, float64 [1 + sums]."""
        offsets = [part.offset for part in self.sums.values()]
        return {"offsets": torch.tensor([float(self._is_measured), *offsets], dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        values = state["offsets"].tolist() if "offsets" in state else []
        if len(values) != 1 + len(self.sums):
            raise ValueError(f"admin: {len(values)} saved values, the model needs {1 + len(self.sums)}")
        self._is_measured = bool(values[0])
        for part, offset in zip(self.sums.values(), values[1:], strict=True):
            part.offset, part.measure = offset, None


def admin(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> Admin | None:
    """None where it is not asked for."""
    return Admin(model) if config.model.residual_weight == "admin" else None
