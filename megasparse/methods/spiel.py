"""SpIEL as a training method, with accumulated gradients (Ansell et al. 2024, arXiv 2401.16405).

Single entries of frozen matrices are trained, a fixed number in each. Every `spiel.interval` steps some of them are
exchanged: for `spiel.selection_steps` steps the gradients of candidates, which the first micro-batch finds by their
magnitude, are added up; then the entries that have moved least go, and as many candidates of largest gradient come. New
entries begin at 0 with moments as if they had been trained in those steps, and with that age.

Dense gradients are there for one layer at a time, in the backward pass, and are averaged over the data-parallel ranks
then: candidates, and what is chosen, are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.schema import RunConfig
from megasparse.layers import DeltaLinear
from megasparse.methods.adapter import AdapterTuning, tuned_layers
from megasparse.methods.callback import Step
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import stream_number
from megasparse.sparsity.random import random_scores
from megasparse.sparsity.selection import INELIGIBLE, select_top_k

KINDS = ("exp_avg", "exp_avg_sq", "weight_steps")


@dataclass
class Candidates:
    """Entries of a layer that may come, and their gradients so far, averaged over the ranks."""

    places: Tensor
    """int64 [n], rising."""
    sums: Tensor
    """float32 [n], over micro-batches."""
    squares: Tensor
    count: Tensor
    """float32 scalar: micro-batches."""


class SpIEL(AdapterTuning):
    """model: rank 0's on the meta device will do for a plan."""

    name = "spiel"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        layers = tuned_layers(model)
        density = config.spiel.density or 0.0
        self.counts = {name: max(round(density * layer.num_units), 1) for name, layer in layers.items()}
        super().__init__(config, model, layers, sum(self.counts.values()))
        self.candidates: dict[str, Candidates] = {}

    def start_from(self, folder: ModelFolder) -> None:
        """Random entries, the same on every rank."""
        super().start_from(folder)
        for name, layer in self.layers.items():
            numbers = torch.arange(layer.num_units)
            scores = random_scores(numbers, self.config.run.seed, 0, stream_number(f"{self.name}/{name}"))
            layer.choose(top(scores, self.counts[name]))

    def begin_step(self, step: Step) -> None:
        settings = self.config.spiel
        place = step.index % settings.interval
        if place == 0:
            self.candidates = {}
        collects = self.mesh is not None and place < settings.selection_steps
        for name, layer in self.layers.items():
            layer.dense_gradient_ready = partial(self._collect, name) if collects else None

    def _collect(self, name: str, gradient: Tensor) -> None:
        """Of one micro-batch, in its backward pass."""
        assert self.mesh is not None
        axis = self.mesh.data_parallel
        known = self.candidates.get(name)
        dense = gradient.to(torch.float32).reshape(-1)
        if known is None:
            dense = axis.sum_(dense.contiguous()).div_(axis.size)
            places = top(dense.abs(), self.counts[name])
            found = dense[places]
            self.candidates[name] = Candidates(places, found, found.square(), found.new_ones(()))
            return
        found = axis.sum_(dense[known.places]).div_(axis.size)
        known.sums += found
        known.squares += found.square()
        known.count += 1

    def after_backward(self, step: Step) -> None:
        settings = self.config.spiel
        if step.index % settings.interval != settings.selection_steps - 1 or set(self.candidates) != set(self.layers):
            return
        share = 1.0
        if step.index >= settings.interval:
            share = settings.drop_fraction * (1.0 - step.index / self.config.train.steps)
        exchanged = self._exchange(share, step.index % settings.interval + 1)
        self.candidates = {}
        step.skip_update = True
        step.records["spiel"] = [{"step": step.number, "share": share, "exchanged": exchanged}]

    @torch.no_grad()
    def _exchange(self, share: float, age: int) -> int:
        """Drop and grow in every layer; the entries that have come."""
        sizes = list(self.adapter.sizes().values())
        fragment = self.fragment()
        kinds = KINDS if fragment is None or fragment.moments else ()
        held = {kind: self.whole(None if kind == "value" else kind).split(sizes) for kind in ("value", *kinds)}
        fresh: dict[str, list[Tensor]] = {kind: [] for kind in held}
        exchanged = 0
        for at, (name, layer) in enumerate(self.layers.items()):
            of_layer = {kind: pieces[at] for kind, pieces in held.items()}
            betas = (self.config.optimizer.beta1, self.config.optimizer.beta2)
            born = seeded(self.candidates[name], age, betas)
            numbers, now, grown = exchange(layer, of_layer, born, round(share * self.counts[name]))
            layer.choose(numbers)
            exchanged += grown
            for kind, values in now.items():
                fresh[kind].append(values)
        if fragment is not None:
            for kind, pieces in fresh.items():
                target = fragment.master if kind == "value" else fragment.moments[kind]
                target.copy_(torch.cat(pieces)[fragment.start : fragment.start + fragment.numel])
        return exchanged

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
    """What candidates begin with: Adam's moments after `age` steps of the mean gradient and the mean square."""
    mean, square = candidates.sums / candidates.count, candidates.squares / candidates.count
    return {
        "place": candidates.places,
        "score": candidates.sums.abs(),
        "value": torch.zeros_like(mean),
        "exp_avg": mean * (1 - betas[0] ** age),
        "exp_avg_sq": square * (1 - betas[1] ** age),
        "weight_steps": torch.full_like(mean, float(age)),
    }


def exchange(
    layer: DeltaLinear, held: Mapping[str, Tensor], born: Mapping[str, Tensor], count: int
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Drop the `count` entries of least magnitude, and grow as many of the candidates `born` that are not kept, those
    of highest score. An entry that is dropped and grown stays as it is.

    held: by kind, float32 [n], of the present entries, rising. Returns the new entries, rising, their values by kind,
    and how many have come.
    """
    assert layer.numbers is not None
    total = layer.numbers.numel()
    # Highest first: those that go have the least magnitude.
    ranked = held["value"].abs()
    keeps = torch.zeros(total, dtype=torch.bool, device=ranked.device)
    keeps[top(ranked, total - count)] = True
    kept = torch.zeros(layer.num_units, dtype=torch.bool, device=ranked.device)
    kept[layer.numbers[keeps]] = True
    eligible = ~kept[born["place"]]
    assert int(eligible.sum()) >= count, "there are as many candidates as entries, so that enough of them are not kept"
    grows = top(born["score"].masked_fill(~eligible, INELIGIBLE), count)
    grown = born["place"][grows]
    present = torch.isin(grown, layer.numbers)
    keeps |= torch.isin(layer.numbers, grown[present])
    numbers = torch.cat([layer.numbers[keeps], grown[~present]])
    order = numbers.argsort()
    values = {kind: torch.cat([held[kind][keeps], born[kind][grows][~present]])[order] for kind in held}
    return numbers[order], values, int((~present).sum())


def top(scores: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores, 0 or more, rising; among equal ones the later."""
    (mark,) = select_top_k([scores.contiguous()], [lambda where: where], [count])
    return mark.nonzero().view(-1)


def spiel(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> SpIEL | None:
    """None where it is not asked for."""
    return None if config.spiel.density is None else SpIEL(config, model)
