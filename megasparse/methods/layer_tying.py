"""Layers that share their weights, as a training method (Dynamic Layer Tying; Hay and Wolf 2024, ICLR).

A layer that is tied to another one is computed by that one's block, so that autograd adds up the gradients of all
places that it is used in; its own block lies idle, with gradients of zero, and what is in it is of no meaning. A layer
that is untied takes over a copy of weights, moments and gradient of the block that it has used. In each ZeRO stage
these are the ranks' pieces, edited before the optimizer step; blocks keep their places, so nothing is built anew.

In every group of tied layers the first one has the weights. Where it is tied elsewhere the next of the group takes them
over. With `fixed` nothing ever changes; with `dynamic` a controller takes an action every `layer_tying.interval` steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megasparse.config.schema import RunConfig
from megasparse.methods.callback import Engine, Step, TrainingMethod
from megasparse.methods.tying_controller import TyingController, reward_of
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh, shard_spec_of
from megasparse.sparsity.state import StateAccess

KINDS = ("master", "gradient", "exp_avg", "exp_avg_sq")


class LayerTying(TrainingMethod):
    """model: rank 0's shard on the meta device will do for a plan."""

    name = "layer_tying"

    def __init__(self, config: RunConfig, model: GPT) -> None:
        self.config, self.model, settings = config, model, config.layer_tying
        self.sources = list(settings.sources or range(len(model.layers)))
        """For each layer the one whose weights it has."""
        self.controller: TyingController | None = None
        self._next_action, self._has_acted = settings.interval, False
        self._engine: Engine | None = None
        self._mesh: Mesh | None = None
        model.tie_layers(self.sources)

    def attach(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh
        if self.config.layer_tying.mode == "dynamic":
            self.controller = TyingController(self.config.layer_tying, len(self.sources), self.config.run.seed)

    def begin_step(self, step: Step) -> None:
        step.metrics["tied_layers"] = len(self.sources) - len(set(self.sources))
        step.metrics["distinct_parameters"] = self.model.num_parameters()

    def after_backward(self, step: Step) -> None:
        """A step that is skipped leaves the action to the next one."""
        if self.controller is None or step.number < self._next_action:
            return
        reward = self._reward(step) if self._has_acted else None
        layer, source = self.controller.decide(self.sources, reward)
        assert self._mesh is not None
        # All ranks have computed the same; one decides all the same.
        layer, source = self._mesh.from_first(torch.tensor([layer, source])).tolist()
        self.apply(layer, source)
        self._next_action, self._has_acted = step.number + self.config.layer_tying.interval, True
        if reward is not None:
            step.metrics["tying_reward"] = reward

    def _reward(self, step: Step) -> float:
        assert self._mesh is not None
        ranks = self._mesh.data_parallel
        loss = ranks.sum_(torch.tensor(step.losses["loss"], dtype=torch.float64, device=self._mesh.device)) / ranks.size
        return reward_of(float(self._mesh.from_first(loss.cpu())), self.config.layer_tying.reward)

    def apply(self, layer: int, source: int) -> None:
        """Give a layer the weights that layer `source` has, or its own; between the last backward pass and the step.
        Every rank calls it."""
        before = set(self.sources)
        self.sources, copied = tied(self.sources, layer, source)
        self.model.tie_layers(self.sources)
        if copied is not None:
            self._copy(*copied)
        for idle in before - set(self.sources):
            # Nobody uses what it was trained by in this step.
            access = self._access(idle)
            for fragment in access.fragments().values():
                fragment.gradient.zero_()
            access.gradients_changed(list(self._parameters(idle)))

    @torch.no_grad()
    def _copy(self, source: int, target: int) -> None:
        """Weights, gradients and moments of a block into another one."""
        assert self._mesh is not None
        giving, taking = self._access(source), self._access(target)
        for name, parameter in self._parameters(source).items():
            numel = prod(shard_spec_of(parameter).local_shape)
            for kind in KINDS:
                flat = torch.zeros(numel, device=self._mesh.device)
                for start, piece in _pieces(giving, name, kind):
                    flat[start : start + piece.numel()] = piece.to(flat)
                # As integers, so that adding keeps every bit.
                giving.shard.sum_(flat.view(torch.int32))
                for start, piece in _pieces(taking, name, kind):
                    piece.copy_(flat[start : start + piece.numel()])
        taking.gradients_changed(list(self._parameters(target)))

    def _parameters(self, layer: int) -> dict[str, nn.Parameter]:
        return dict(self.model.layers[layer].named_parameters())

    def _access(self, layer: int) -> StateAccess:
        assert self._engine is not None
        return self._engine.access(self._parameters(layer))

    def plan_lines(self) -> list[str]:
        settings = self.config.layer_tying
        if settings.mode == "fixed":
            distinct = len(set(self.sources))
            parameters = self.model.num_parameters()
            return [f"{len(self.sources)} layers have the weights of {distinct}: {parameters:,} parameters"]
        return [
            f"a controller ties or unties a layer every {settings.interval} steps; memory, traffic and FLOPs are those "
            "of untied layers"
        ]

    def summary(self) -> dict[str, Any]:
        return {"layer_sources": list(self.sources), "distinct_parameters": self.model.num_parameters()}

    def state(self) -> dict[str, Tensor]:
        place = {
            "sources": torch.tensor(self.sources),
            "next_action": torch.tensor([self._next_action, int(self._has_acted)]),
        }
        return place | ({} if self.controller is None else self.controller.state())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the state of another model."""
        sources = state["sources"].tolist() if "sources" in state else []
        if len(sources) != len(self.sources):
            raise ValueError(f"layer_tying: {len(sources)} saved layers, the model has {len(self.sources)}")
        self.sources = sources
        self.model.tie_layers(sources)
        self._next_action, acted = state["next_action"].tolist()
        self._has_acted = bool(acted)
        if self.controller is not None:
            self.controller.load_state(state)


def tied(sources: Sequence[int], layer: int, source: int) -> tuple[list[int], tuple[int, int] | None]:
    """Sources after an action, and (from, to) of the block that must be copied; None: none. source: at most `layer`.

    A layer that is to have its own weights and shares them with later ones goes on as it is.
    """
    found, root = list(sources), layer if source == layer else sources[source]
    if root == found[layer]:
        return found, None
    copied = None
    if root == layer:
        copied = found[layer], layer
    elif followers := [other for other, its in enumerate(found) if its == layer and other != layer]:
        copied = layer, followers[0]
        for follower in followers:
            found[follower] = followers[0]
    found[layer] = root
    return found, copied


def _pieces(access: StateAccess, name: str, kind: str) -> list[tuple[int, Tensor]]:
    """(first entry, piece) where this rank holds one; there are no moments before the first optimizer step."""
    fragment = access.fragments().get(name)
    if fragment is None:
        return []
    tensors = {"master": fragment.master, "gradient": fragment.gradient, **fragment.moments}
    return [(fragment.start, tensors[kind])] if kind in tensors else []


def layer_tying(config: RunConfig, model: GPT, tensor_parallel: CommunicationGroup) -> LayerTying | None:
    """None where it is not asked for."""
    return None if config.layer_tying.mode == "none" else LayerTying(config, model)
