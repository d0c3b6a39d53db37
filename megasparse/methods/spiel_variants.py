"""The two variants of SpIEL: by what they choose the entries that come, and how they train them.

- ``AccumulatedGradients`` (SpIEL-AG): for `spiel.selection_steps` steps the gradients of candidates, which the first
  micro-batch finds by their magnitude, are added up; those of a skipped step are not. The optimizer is AdamW; new
  entries begin at 0 with moments as if they had been trained in those steps, and with that age. Dense gradients are
  there for one layer at a time, in the backward pass, and are averaged over the data-parallel ranks then.
- ``MomentApproximation`` (SpIEL-MA): the optimizer is SM3 (Anil et al. 2019, arXiv 1901.11150), which keeps a number
  for each row and each column of a matrix and none for an entry. Their products say which inactive entries come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor, nn

from megasparse.config.schema import RunConfig
from megasparse.engine.optimizer import ParameterGroup
from megasparse.kernels.optimizer import sm3_
from megasparse.methods.callback import Engine, Step
from megasparse.methods.spiel import SpIEL, top
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.selection import INELIGIBLE


@dataclass
class Candidates:
    """Entries of a layer that may come, and their gradients so far, averaged over the ranks."""

    places: Tensor
    """int32 [n], rising; int64 where a matrix has more entries than that counts."""
    sums: Tensor
    """float32 [n], over steps."""
    squares: Tensor
    """float32 [n], of the gradients of steps."""
    count: Tensor
    """float32 scalar: steps."""


class AccumulatedGradients(SpIEL):
    moments = ("exp_avg", "exp_avg_sq", "weight_steps")

    def __init__(self, config: RunConfig, model: GPT) -> None:
        super().__init__(config, model)
        self.candidates: dict[str, Candidates] = {}
        self.of_step: dict[str, tuple[Tensor, Tensor]] = {}
        """By layer (places, gradients) of the step under way, which may yet be skipped."""

    def begin_step(self, step: Step) -> None:
        settings = self.config.spiel
        place = step.index % settings.interval
        self.of_step = {}
        if place == 0:
            self.candidates = {}
        collects = self.mesh is not None and place < settings.selection_steps
        for name, layer in self.layers.items():
            layer.dense_gradient_ready = partial(self._collect, name) if collects else None

    def _collect(self, name: str, gradient: Tensor) -> None:
        """Of one micro-batch, in its backward pass. The engine has divided it by the number of micro-batches."""
        assert self.mesh is not None
        axis = self.mesh.data_parallel
        dense = gradient.to(torch.float32).reshape(-1)
        if name in self.of_step:
            places, sums = self.of_step[name]
        elif name in self.candidates:
            places, sums = self.candidates[name].places, torch.zeros_like(self.candidates[name].sums)
        else:
            dense = axis.sum_(dense.contiguous()).div_(axis.size)
            # What is not finite has no place in an order; its step will be skipped.
            places = top(dense.abs().nan_to_num_(), self.counts[name])
            sums = dense[places]
            places = places.to(torch.int32) if dense.numel() < 2**31 else places
            self.of_step[name] = places, sums
            return
        sums += axis.sum_(dense[places]).div_(axis.size)
        self.of_step[name] = places, sums

    def after_backward(self, step: Step) -> None:
        for name, (places, sums) in self.of_step.items():
            known = self.candidates.get(name)
            if known is None:
                self.candidates[name] = Candidates(places, sums, sums.square(), sums.new_ones(()))
            else:
                known.sums += sums
                known.squares += sums.square()
                known.count += 1
        self.of_step = {}
        super().after_backward(step)

    def candidates_known(self) -> bool:
        return set(self.candidates) == set(self.layers)

    def candidates_of(self, name: str, age: int) -> Mapping[str, Tensor]:
        return seeded(self.candidates[name], age, (self.config.optimizer.beta1, self.config.optimizer.beta2))

    def forget_candidates(self) -> None:
        self.candidates = {}

    def plan_lines(self) -> list[str]:
        settings = self.config.spiel
        return [
            f"SpIEL: {sum(self.counts.values()):,} entries of {len(self.layers)} matrices ({settings.density:.2%}), "
            f"some exchanged every {settings.interval} steps by {settings.selection_steps} steps of gradients"
        ]

    def state(self) -> dict[str, Tensor]:
        found = super().state()
        for name, candidates in self.candidates.items():
            found |= {f"candidate-{f.name}/{name}": getattr(candidates, f.name).cpu() for f in fields(candidates)}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for name, layer in self.layers.items():
            if f"candidate-places/{name}" in state:
                device = layer.weight.device
                found = {f.name: state[f"candidate-{f.name}/{name}"] for f in fields(Candidates)}
                self.candidates[name] = Candidates(**{kind: t.to(device, copy=True) for kind, t in found.items()})


def seeded(candidates: Candidates, age: int, betas: tuple[float, float]) -> dict[str, Tensor]:
    """What candidates begin with: Adam's moments after `age` steps of the mean gradient and the mean square of those of
    the steps."""
    mean, square = candidates.sums / candidates.count, candidates.squares / candidates.count
    return {
        "place": candidates.places.long(),
        "score": candidates.sums.abs(),
        "value": torch.zeros_like(mean),
        "exp_avg": mean * (1 - betas[0] ** age),
        "exp_avg_sq": square * (1 - betas[1] ** age),
        "weight_steps": torch.full_like(mean, float(age)),
    }


class MomentApproximation(SpIEL):
    """Attributes:
    rows, columns: float32 [out], [in] by layer: SM3's accumulators, the same on every rank between two steps.
    """

    def __init__(self, config: RunConfig, model: GPT) -> None:
        super().__init__(config, model)
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}

    def groups(self) -> Sequence[tuple[ParameterGroup, Sequence[nn.Parameter]]]:
        """No moments and no step counts: this method makes the steps."""
        return [(ParameterGroup("adapter", update=self._update), [self.adapter.values])]

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        super().attach(engine, mesh)
        for name, layer in self.layers.items():
            device = layer.weight.device
            self.rows[name] = torch.zeros(layer.out_features, device=device)
            self.columns[name] = torch.zeros(layer.in_features, device=device)
        fragment = self.fragment()
        self._start, self._numel = (0, 0) if fragment is None else (fragment.start, fragment.numel)

    def _update(self, values: Tensor, gradient: Tensor, lr: float) -> None:
        """SM3 of this rank's piece of the entries, float32 [n], of which the last ones may be padding."""
        begin, end, at = self._start, self._start + self._numel, 0
        for name, layer in self.layers.items():
            assert layer.numbers is not None
            first, last = max(begin, at), min(end, at + layer.numbers.numel())
            if first < last:
                numbers = layer.numbers[first - at : last - at].to(values.device)
                here = slice(first - begin, last - begin)
                accumulators = self.rows[name].to(values.device), self.columns[name].to(values.device)
                places = numbers // layer.in_features, numbers % layer.in_features
                sm3_(values[here], gradient[here], accumulators, places, lr, self.config.optimizer.epsilon)
                self.rows[name].copy_(accumulators[0])
                self.columns[name].copy_(accumulators[1])
            at += layer.numbers.numel()

    def after_step(self, step: Step) -> None:
        """The largest of all ranks, which each had a piece of the entries."""
        if self.mesh is None:
            return
        every = [*self.rows.values(), *self.columns.values()]
        joined = self.mesh.data_parallel.max_(torch.cat(every))
        for tensor, largest in zip(every, joined.split([tensor.numel() for tensor in every]), strict=True):
            tensor.copy_(largest)

    def candidates_known(self) -> bool:
        """A step has been made."""
        return any(bool(rows.any()) for rows in self.rows.values())

    def candidates_of(self, name: str, age: int) -> Mapping[str, Tensor]:
        """The inactive entries whose row and column have seen the largest gradients."""
        layer = self.layers[name]
        assert layer.numbers is not None
        scores = moment_scores(self.rows[name], self.columns[name], layer.numbers)
        count = min(self.counts[name], layer.num_units - self.counts[name])
        places = top(scores, count)
        return {"place": places, "score": scores[places], "value": torch.zeros_like(scores[places])}

    def plan_lines(self) -> list[str]:
        settings = self.config.spiel
        return [
            f"SpIEL: {sum(self.counts.values()):,} entries of {len(self.layers)} matrices ({settings.density:.2%}) by "
            f"SM3, some exchanged every {settings.interval} steps by its accumulators"
        ]

    def state(self) -> dict[str, Tensor]:
        kinds = {"rows": self.rows, "columns": self.columns}
        found = {f"sm3-{kind}/{name}": t.cpu() for kind, tensors in kinds.items() for name, t in tensors.items()}
        return super().state() | found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for name in self.layers:
            self.rows[name].copy_(state[f"sm3-rows/{name}"])
            self.columns[name].copy_(state[f"sm3-columns/{name}"])


def moment_scores(rows: Tensor, columns: Tensor, active: Tensor) -> Tensor:
    """Roots of the products of accumulators [R], [C], which rank entries as the products do and do not come to 0 where
    numbers are small: float32 [R C], INELIGIBLE where an entry is active (int64 [n])."""
    scores = torch.outer(rows.sqrt(), columns.sqrt()).view(-1)
    scores[active] = INELIGIBLE
    return scores


VARIANTS: Mapping[str, type[SpIEL]] = {
    "accumulated_gradients": AccumulatedGradients,
    "moment_approximation": MomentApproximation,
}


def spiel(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> SpIEL | None:
    """None where it is not asked for."""
    return None if config.spiel.density is None else VARIANTS[config.spiel.variant](config, model)
