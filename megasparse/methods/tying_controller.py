"""Which layers are tied: a small network that values actions, trained while they are made (Q-learning).

    controller = TyingController(settings, num_layers, seed)
    layer, source = controller.decide(sources, reward)       # of the action before; None: there was none

The state is the source of each layer. Layers 1 to L - 1 are decided on in turn, over and over; layer i may take the
weights of layer j < i, or its own, j = i. There is one value for each (i, j). With probability epsilon, which falls
from one pass over the layers to the next, an action is drawn at random; else the one of highest value is taken. Each
action is learned from once, when its reward is known: no replay, no second network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp

import torch
from torch import Tensor

from megasparse.config.layer_tying import LayerTyingConfig
from megasparse.sparsity.controller import stream_number
from megasparse.sparsity.random import WORD, random_words

LIMIT = 10.0
"""Largest magnitude of a reward."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class TyingController:
    """All ranks hold the same one.

    Attributes: `layer` is decided on next; `passes` over the layers are finished; `actions` were taken.
    """

    def __init__(self, settings: LayerTyingConfig, num_layers: int, seed: int) -> None:
        self.settings, self.num_layers, self.seed = settings, num_layers, seed
        self.layer, self.passes, self.actions = 1, 0, 0
        self._stream = stream_number("layer_tying")
        self._before: tuple[Tensor, int] | None = None
        """State and number of the last action."""
        generator = torch.Generator().manual_seed(seed)
        sizes = [(num_layers, settings.hidden_size), (settings.hidden_size, first_action(num_layers))]
        # Drawn as those of torch's own linear layers.
        self.weights = [
            ((2 * torch.rand(*shape, generator=generator) - 1) * inner**-0.5).requires_grad_()
            for inner, outer in sizes
            for shape in ((outer, inner), (outer,))
        ]
        self._optimizer = torch.optim.Adam(self.weights, lr=settings.lr)

    @property
    def epsilon(self) -> float:
        """Share of random actions."""
        return max(self.settings.epsilon_decay**self.passes, self.settings.epsilon_floor)

    def values(self, state: Tensor) -> Tensor:
        """Of all actions, layer after layer: float32 [L (L + 1) / 2 - 1]. state: float32 [L]."""
        inner, inner_bias, outer, outer_bias = self.weights
        return outer @ torch.relu(inner @ state + inner_bias) + outer_bias

    def decide(self, sources: Sequence[int], reward: float | None) -> tuple[int, int]:
        """The layer and the source that it shall have. sources: of all layers now, since the last action. reward: of
        that; None: it is not known, and nothing is learned."""
        state, first = torch.tensor(sources, dtype=torch.float32), first_action(self.layer)
        with torch.no_grad():
            values = self.values(state)[first : first + self.layer + 1]
        if self._before is not None and reward is not None:
            self._learn(*self._before, reward + self.settings.discount * float(values.max()))
        chance, which = random_words(torch.arange(2), self.seed, self.actions, self._stream).tolist()
        if chance < self.epsilon * (WORD + 1):
            source = which % (self.layer + 1)
        else:
            with torch.no_grad():
                source = int(self.values(state)[first : first + self.layer + 1].argmax())
        self._before, taken = (state, first + source), (self.layer, source)
        self.actions, self.layer = self.actions + 1, self.layer + 1
        if self.layer == self.num_layers:
            self.layer, self.passes = 1, self.passes + 1
        return taken

    def _learn(self, state: Tensor, action: int, target: float) -> None:
        """One step towards the value of an action."""
        self._optimizer.zero_grad()
        (self.values(state)[action] - target).square().backward()
        self._optimizer.step()

    def state(self) -> dict[str, Tensor]:
        action, state = (-1, torch.zeros(self.num_layers)) if self._before is None else self._before[::-1]
        found = {"place": torch.tensor([self.layer, self.passes, self.actions, action]), "before": state.clone()}
        for number, weight in enumerate(self.weights):
            found[f"weight/{number}"] = weight.detach().clone()
            moments = self._optimizer.state.get(weight, {})
            found |= {f"{kind}/{number}": moments[kind].clone() for kind in MOMENTS if kind in moments}
        return found

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError where it is of a network of another shape."""
        if any(state[f"weight/{n}"].shape != weight.shape for n, weight in enumerate(self.weights)):
            raise ValueError("layer_tying.hidden_size: the saved network has another shape; must be as it was")
        self.layer, self.passes, self.actions, action = state["place"].tolist()
        self._before = None if action < 0 else (state["before"].clone(), action)
        for number, weight in enumerate(self.weights):
            weight.copy_(state[f"weight/{number}"])
            if f"step/{number}" in state:
                self._optimizer.state[weight] = {kind: state[f"{kind}/{number}"].clone() for kind in MOMENTS}


def first_action(layer: int) -> int:
    """The number of the first action for a layer: layer i, from 1 on, has i + 1."""
    return layer * (layer + 1) // 2 - 1


def reward_of(loss: float, kind: str) -> float:
    """Of the loss of a batch that came after the action; kind: `layer_tying.reward`."""
    cost = loss if kind == "loss" else exp(min(loss, LIMIT))
    return max(-LIMIT, min(LIMIT, -cost))
