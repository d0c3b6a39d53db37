"""Collectives with a gradient, as tensor-parallel layers need them.

``TensorParallel`` is what a layer is given. Between layers activations are replicated over its ranks or, with sequence
parallelism (Korthikanti et al. 2022, arXiv 2205.05198), divided along the tokens; the layer calls the same methods:

    x = tensor_parallel.copy_to_region(x)          # into a column-divided product
    y = tensor_parallel.reduce_from_region(y)          # out of a row-divided product: partial sums become sums
    w = tensor_parallel.shared(w)         # a replicated parameter that is used between layers

With one rank every method returns its argument. Tensor names: B samples, T tokens, C channels; the tokens are dimension
1 of [B, T, ...].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megasparse.parallel.group import CommunicationGroup

Collective = Callable[[Tensor, CommunicationGroup], Tensor]


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each layer, and how activations lie between layers."""

    axis: CommunicationGroup = field(default_factory=CommunicationGroup)
    sequence_parallel: bool = False
    """Between layers each rank holds its share of the tokens of every sample; their number must divide."""

    @property
    def size(self) -> int:
        return self.axis.size

    @property
    def rank(self) -> int:
        return self.axis.rank

    def copy_to_region(self, x: Tensor) -> Tensor:
        """From between layers to the whole activation that every rank multiplies with its shard."""
        if self.sequence_parallel:
            return self._apply(x, _join_tokens, _sum_and_divide_tokens)
        return self.copy_to_tensor_parallel_region(x)

    def reduce_from_region(self, y: Tensor) -> Tensor:
        """From this rank's part of a sum to what lies between layers."""
        if self.sequence_parallel:
            return self._apply(y, _sum_and_divide_tokens, _join_tokens)
        return self.reduce_from_tensor_parallel_region(y)

    def shared(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used between layers: its gradient is complete on every rank."""
        return self.copy_to_tensor_parallel_region(parameter) if self.sequence_parallel else parameter

    def scatter_to_sequence_parallel_region(self, x: Tensor) -> Tensor:
        """From an activation that is replicated to what lies between layers."""
        return self._apply(x, _divide_tokens, _join_tokens) if self.sequence_parallel else x

    def copy_to_tensor_parallel_region(self, x: Tensor) -> Tensor:
        """The same on every rank; gradients add up (f of Shoeybi et al. 2019, arXiv 1909.08053)."""
        return self._apply(x, _same, _sum)

    def reduce_from_tensor_parallel_region(self, x: Tensor) -> Tensor:
        """The sum over the ranks; the gradient is the same on every rank (g of Shoeybi et al.)."""
        return self._apply(x, _sum, _same)

    def gather_from_tensor_parallel_region(self, x: Tensor) -> Tensor:
        """Shards of the last dimension, side by side, on every rank."""
        return self._apply(x, _join_channels, _divide_channels)

    def _apply(self, x: Tensor, forward: Collective, backward: Collective) -> Tensor:
        return x if self.size == 1 else _Mapping.apply(x, self.axis, forward, backward)


class _Mapping(torch.autograd.Function):
    """One collective forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: CommunicationGroup, forward: Collective, backward: Collective) -> Tensor:
        ctx.axis, ctx.backward_collective = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward_collective(dy, ctx.axis), None, None, None


def _same(x: Tensor, axis: CommunicationGroup) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, axis: CommunicationGroup) -> Tensor:
    return axis.sum_(x.clone(memory_format=torch.contiguous_format))


def _divide_tokens(x_BTC: Tensor, axis: CommunicationGroup) -> Tensor:
    assert x_BTC.shape[1] % axis.size == 0, f"{x_BTC.shape[1]} tokens over {axis.size} ranks"
    return x_BTC.chunk(axis.size, dim=1)[axis.rank].contiguous()


def _join_tokens(x_BTC: Tensor, axis: CommunicationGroup) -> Tensor:
    return axis.gather(x_BTC).transpose(0, 1).flatten(1, 2)


def _sum_and_divide_tokens(x_BTC: Tensor, axis: CommunicationGroup) -> Tensor:
    assert x_BTC.shape[1] % axis.size == 0, f"{x_BTC.shape[1]} tokens over {axis.size} ranks"
    return axis.scatter_sum(x_BTC.unflatten(1, (axis.size, -1)).transpose(0, 1))


def _join_channels(x: Tensor, axis: CommunicationGroup) -> Tensor:
    return torch.cat(axis.gather(x).unbind(0), dim=-1)


def _divide_channels(x: Tensor, axis: CommunicationGroup) -> Tensor:
    return x.chunk(axis.size, dim=-1)[axis.rank].contiguous()
