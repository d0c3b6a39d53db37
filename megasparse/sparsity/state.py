"""What a topology update sees of the training state: the pieces of weights, moments and gradients that a rank holds.

The controller works on these alone. How an optimizer of a given ZeRO stage hands them out is the business of
``megasparse.engine.fragments``, which implements ``StateAccess``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megasparse.sparsity.dense_gradients import BlockShare


@dataclass(frozen=True)
class StateFragment:
    """Entries [start, start + numel) of a flat weight matrix, this tensor-parallel rank's shard of it; with packed
    storage of its blocks, slot after slot.

    The tensors [numel] are views, edited in place.
    """

    start: int
    master: Tensor
    """float32 weights that the optimizer updates."""
    gradient: Tensor
    """Averaged over data-parallel ranks and micro-batches, times `gradient_scale`."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """`exp_avg`, `exp_avg_sq`, and `weight_steps` where it is kept; empty before the first optimizer step."""
    gradient_scale: float = 1.0
    """Loss scale that is still in the gradient (float16 training)."""

    @property
    def numel(self) -> int:
        return self.master.numel()


class Ranks(Protocol):
    """Ranks that exchange something; ``megasparse.parallel.Axis`` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def sum_(self, tensor: Tensor) -> Tensor: ...
    def gather(self, tensor: Tensor) -> Tensor: ...


def whole_vector(values: Tensor | None, start: int, numel: int, ranks: Ranks, device: torch.device) -> Tensor:
    """A flat tensor of which each rank holds a piece, whole on all of them, which all call it: float32 [numel].

    values: this rank's entries from `start` on; None: it holds nothing.
    """
    flat = torch.zeros(numel, device=device)
    if values is not None:
        flat[start : start + values.numel()] = values.to(device)
    return ranks.sum_(flat)


class Importance(Protocol):
    """What weights are worth, in place of `sparsity.drop_score`; a training method offers it for a step."""

    def scores(self, access: StateAccess) -> Mapping[str, Tensor]:
        """Drop scores of the weights of each fragment, float32 [n], 0 or more; of blocks their squares add up."""
        ...

    def compensate(self, access: StateAccess) -> None:
        """After the topologies have changed: let weights that stay make up for those that are gone."""
        ...


class StateAccess(Protocol):
    """State of the sparse matrices between ``backward`` and ``step``."""

    dense_gradients: Mapping[str, BlockShare]
    """This rank's shares of the dense gradients of layers with packed storage, where they were asked for."""

    @property
    def shard(self) -> Ranks:
        """Ranks whose fragments make up this tensor-parallel shard; one where each rank holds all of it."""
        ...

    @property
    def tensor_parallel(self) -> Ranks:
        """Ranks whose shards make up the whole matrix."""
        ...

    @property
    def whole(self) -> Ranks:
        """Ranks whose fragments make up the whole matrix."""
        ...

    def fragments(self) -> Mapping[str, StateFragment]:
        """This rank's piece of each sparse matrix by layer name; layers of which it holds nothing are left out."""
        ...

    def gradients_changed(self, names: Iterable[str]) -> None:
        """To be told which gradients were edited, for an optimizer that has taken their norms already."""
        ...
