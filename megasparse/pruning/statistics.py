"""What calibration tells about the inputs of linear layers: collected while a block runs, summed over ranks.

    with collecting(layers, InputGram) as found:
        block(x)
    gram = found["layers.0.mlp.up"].total(ranks)

Every window's sum is made in float32 by itself and added up in float64, so that the order of windows, and so the number
of ranks that share them, changes the total by 1e-16 of it at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from megasparse.layers import Linear
from megasparse.parallel import CommunicationGroup


class InputStatistic(Protocol):
    def add(self, inputs: Tensor) -> None:
        """inputs: float32 [tokens, in] of one window."""

    def total(self, ranks: CommunicationGroup) -> Tensor:
        """Over all windows of all ranks; every rank calls it, once."""
        ...


class InputSquares:
    """Sum of squares of each input, float64 [in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        self._sum += inputs.square().sum(0)

    def total(self, ranks: CommunicationGroup) -> Tensor:
        return ranks.sum_(self._sum)


class InputGram:
    """Sum of x x^T, float64 [in, in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros((width, width), dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        self._sum += inputs.T @ inputs

    def total(self, ranks: CommunicationGroup) -> Tensor:
        return ranks.sum_(self._sum)


class InputMaxima:
    """Largest magnitude of each input, float32 [in]."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._largest = torch.zeros(width, device=device)

    def add(self, inputs: Tensor) -> None:
        torch.maximum(self._largest, inputs.abs().amax(0), out=self._largest)

    def total(self, ranks: CommunicationGroup) -> Tensor:
        return ranks.max_(self._largest)


ROWS = 1024
"""Of a weight whose products are in memory at a time."""
S = TypeVar("S", bound=InputStatistic)


@contextmanager
def collecting(layers: Mapping[str, Linear], kind: Callable[[int, torch.device], S]) -> Iterator[dict[str, S]]:
    """The statistics of these layers' inputs by name, of every forward pass inside."""
    found = {name: kind(layer.in_features, layer.weight.device) for name, layer in layers.items()}

    def watch(statistic: S) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: statistic.add(inputs[0].reshape(-1, inputs[0].shape[-1]).float())

    hooks = [layer.register_forward_pre_hook(watch(found[name])) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 over the calibration tokens, from X X^T; 0 where the layer has no output."""
    # Products in float32, at half the time: what is told apart by this number is far above its 1e-6.
    gram = gram.float()
    energy = _energy(weight, gram)
    return max(0.0, _energy(weight - pruned, gram) / energy) if energy > 0 else 0.0


def _energy(weight: Tensor, gram: Tensor) -> float:
    return sum(((part @ gram).double() * part).sum().item() for part in weight.split(ROWS))
