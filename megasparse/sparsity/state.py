"""What a topology step sees of the training state: the pieces of weights, moments and gradients that a rank holds.

The controller works on these alone. How an optimizer of a given ZeRO stage hands them out is the business of
``megasparse.engine.fragments``, which implements ``StateAccess``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StateFragment:
    """Entries [start, start + numel) of one flat weight matrix; tensors [numel] are views, edited in place."""

    start: int
    master: Tensor
    """float32 weights that the optimizer updates."""
    gradient: Tensor
    """Averaged over data-parallel ranks and micro-batches, times `gradient_scale`."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """`exp_avg`, `exp_avg_sq`, and `age` where it is kept; empty before the first optimizer step."""
    gradient_scale: float = 1.0
    """Loss scale that is still in the gradient (float16 training)."""

    @property
    def numel(self) -> int:
        return self.master.numel()


class StateAccess(Protocol):
    """State of the sparse matrices between ``backward`` and ``step``."""

    def fragments(self) -> Mapping[str, StateFragment]:
        """This rank's piece of each sparse matrix by layer name; layers of which it holds nothing are left out."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether the pieces of several ranks make up one matrix; otherwise every rank holds all of it."""
        ...

    def sum_over_shards(self, tensor: Tensor) -> None:
        """Add up a tensor over the ranks that share the matrices, in place; nothing to do where none do."""
        ...
