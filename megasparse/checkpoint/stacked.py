"""A saved state of few layers seen as one of more, each a copy of one of them (G_stack, see ``config.stages``).

    grown = StackedState(Checkpoint(folder), small=2, num_layers=8)
    grown.tensor("layers.5.mlp.up.weight", "fp32")         # that of layers.1

Weights and masks are copied. The optimizer begins anew, with moments, step count and steps of single weights at 0:
those of the small model belong to other gradients. Weights keep their values, as in the paper: residual projections
were drawn with init_std / sqrt(2 n) for n layers, and their copies are not rescaled to the larger depth. With norms
before every block the result does not compute what the small model computed, so the loss is higher at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from megasparse.checkpoint.saved_state import WEIGHT, RunFacts
from megasparse.config.stages import copies, layer_number, original
from megasparse.parallel import ShardSpec

LOSSES = ("loss", "val_loss")
"""What is known of a model folder that its copy has not."""


class Original(Protocol):
    """What is asked of the state of the small model; ``fragment`` and ``method_state`` of checkpoints only."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def facts(self) -> RunFacts: ...
    def tensor(self, name: str, kind: str) -> Tensor: ...
    def topology(self) -> dict[str, Tensor]: ...
    def loss_scaler(self) -> Mapping[str, float]: ...


class Fragments(Original, Protocol):
    """A checkpoint: a state that is read piece by piece."""

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor: ...
    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor: ...
    def method_state(self, method: str) -> dict[str, Tensor]: ...


class StackedState:
    """A ``SavedState`` of `num_layers` layers from one of `small`, which divides them.

    Attributes:
        step: of the optimizer: 0, there are no moments.
    """

    step = 0

    def __init__(self, saved: Original, small: int, num_layers: int) -> None:
        assert num_layers % small == 0, (num_layers, small)
        self.saved, self.small, self.num_layers = saved, small, num_layers
        self.shapes = {copy: saved.shapes[name] for name in saved.shapes for copy in self._copies(name)}
        self.shapes = {name: self.shapes[name] for name in sorted(self.shapes, key=_place(list(saved.shapes)))}

    @property
    def facts(self) -> RunFacts:
        facts = self.saved.facts
        model = {**facts.model, "num_layers": self.num_layers}
        # The losses that are known are not those of this model.
        known = {name: fact for name, fact in facts.train_state.items() if name not in LOSSES}
        return RunFacts(facts.step, model, known, facts.window_losses)

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def tensor(self, name: str, kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        return self.saved.tensor(original(name, self.small), kind)

    def topology(self) -> dict[str, Tensor]:
        return self._stacked(self.saved.topology())

    def loss_scaler(self) -> Mapping[str, float]:
        """That of the small model: a scale that is too high would cost steps, for nothing."""
        return self.saved.loss_scaler()

    def _stacked(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # Copies: safetensors refuses tensors that share memory.
        return {copy: bits.clone() for name, bits in tensors.items() for copy in self._copies(name)}

    def _copies(self, name: str) -> list[str]:
        return copies(name, self.small, self.num_layers)


class StackedCheckpoint(StackedState):
    """The same of a checkpoint: each rank reads the pieces that it owns, at any layout."""

    def __init__(self, saved: Fragments, small: int, num_layers: int) -> None:
        super().__init__(saved, small, num_layers)
        self._fragments = saved

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor:
        return self._fragments.fragment(original(name, self.small), kind, spec, rank, start, numel)

    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
        return self._fragments.blocks(original(name, self.small), kind, grid, rank, numbers)

    def method_state(self, method: str) -> dict[str, Tensor]:
        """What is saved under the name of a layer is copied with it; the rest is as it was."""
        return self._stacked(self._fragments.method_state(method))


def _place(names: Sequence[str]) -> Callable[[str], tuple[int, int, int]]:
    """Sorts in the order of a model, block after block. names: of the small one, in that order."""
    first = next((index for index, name in enumerate(names) if layer_number(name) is not None), 0)
    within = {name: index for index, name in enumerate(names)}
    small = 1 + max((layer_number(name) or 0 for name in names), default=0)

    def place(name: str) -> tuple[int, int, int]:
        layer, index = layer_number(name), within[original(name, small)]
        return (index, 0, 0) if layer is None else (first, layer, index)

    return place
