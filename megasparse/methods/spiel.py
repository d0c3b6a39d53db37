"""SpIEL as a training method (Ansell et al. 2024, arXiv 2401.16405): what its two variants have in common.

Single entries of frozen matrices are trained, a fixed number in each, random ones at first. Every `spiel.interval`
steps some of them are exchanged, `spiel.selection_steps` steps into the interval: the entries that have moved least go,
and as many candidates of highest score come. What candidates and scores are, and by which optimizer entries are
trained, is said by a variant (``spiel_variants``); both are the same on every rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.config.schema import RunConfig
from megasparse.layers import DeltaLinear
from megasparse.methods.adapter import AdapterTuning, tuned_layers
from megasparse.methods.callback import Step
from megasparse.models.gpt import GPT
from megasparse.sparsity.controller import stream_number
from megasparse.sparsity.random import random_scores
from megasparse.sparsity.selection import INELIGIBLE, select_top_k


class SpIEL(AdapterTuning):
    """model: rank 0's on the meta device will do for a plan."""

    name = "spiel"
    moments: Sequence[str] = ()
    """What the optimizer keeps of each entry besides its value."""

    def __init__(self, config: RunConfig, model: GPT) -> None:
        layers = tuned_layers(model)
        density = config.spiel.density or 0.0
        self.counts = {name: max(round(density * layer.num_units), 1) for name, layer in layers.items()}
        super().__init__(config, model, layers, sum(self.counts.values()))

    def start_from(self, folder: ModelFolder) -> None:
        """Random entries, the same on every rank."""
        super().start_from(folder)
        for name, layer in self.layers.items():
            numbers = torch.arange(layer.num_units)
            scores = random_scores(numbers, self.config.run.seed, 0, stream_number(f"{self.name}/{name}"))
            layer.choose(top(scores, self.counts[name]))

    @abstractmethod
    def candidates_known(self) -> bool:
        """Whether enough has been seen for an exchange."""

    @abstractmethod
    def candidates_of(self, name: str, age: int) -> Mapping[str, Tensor]:
        """Entries of a layer that may come, as many as it has, or all of those that are inactive: `place` int64 [n],
        rising, `score` float32 [n], 0 or more, and the `value` and `moments` that each begins with.

        age: steps of this interval.
        """

    def forget_candidates(self) -> None:
        """After an exchange."""

    def after_backward(self, step: Step) -> None:
        settings = self.config.spiel
        if step.index % settings.interval != settings.selection_steps - 1 or not self.candidates_known():
            return
        share = 1.0
        if step.index >= settings.interval:
            share = settings.drop_fraction * (1.0 - step.index / self.config.train.steps)
        exchanged = self._exchange(share, step.index % settings.interval + 1)
        self.forget_candidates()
        step.skip_update = True
        step.records["spiel"] = [{"step": step.number, "share": share, "exchanged": exchanged}]

    @torch.no_grad()
    def _exchange(self, share: float, age: int) -> int:
        """Drop and grow in every layer; the entries that have come."""
        sizes = list(self.adapter.sizes().values())
        fragment = self.fragment()
        kinds = self.moments if fragment is None or fragment.moments else ()
        held = {kind: self.whole(None if kind == "value" else kind).split(sizes) for kind in ("value", *kinds)}
        fresh: dict[str, list[Tensor]] = {kind: [] for kind in held}
        exchanged = 0
        for at, (name, layer) in enumerate(self.layers.items()):
            of_layer = {kind: pieces[at] for kind, pieces in held.items()}
            born = self.candidates_of(name, age)
            count = min(round(share * self.counts[name]), born["place"].numel())
            numbers, now, grown = exchange(layer, of_layer, born, count)
            layer.choose(numbers)
            exchanged += grown
            for kind, values in now.items():
                fresh[kind].append(values)
        if fragment is not None:
            for kind, pieces in fresh.items():
                target = fragment.master if kind == "value" else fragment.moments[kind]
                target.copy_(torch.cat(pieces)[fragment.start : fragment.start + fragment.numel])
        return exchanged


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
