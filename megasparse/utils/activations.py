"""The activations of the perceptron: the one table that settings, layers, costs, plans and conversion read.

    activation = ACTIVATIONS[config.model.activation]

A new one is an entry here and a name in ``ModelConfig.activation``; conversion knows it by the names given here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """What lies between the two products of a perceptron."""

    function: Callable[[Tensor], Tensor]
    """Element by element, any shape and dtype."""
    gated: bool = False
    """The function of one half of the first product multiplies its other half (Shazeer, 2020, arXiv 2002.05202)."""
    transformers_names: tuple[str, ...] = ()
    """What it is called in config.json of transformers, the name to write first; none: it cannot be exported."""

    @property
    def inner_tensors(self) -> int:
        """Tensors of the inner width that the forward pass reads and writes, and that the backward pass needs."""
        return 3 if self.gated else 2


def _squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668): most of it is exactly 0 once trained."""
    return F.relu(x).square()


ACTIVATIONS = {
    "gelu": Activation(partial(F.gelu, approximate="tanh"), transformers_names=("gelu_new", "gelu_pytorch_tanh")),
    "gelu_exact": Activation(F.gelu, transformers_names=("gelu",)),
    "relu2": Activation(_squared_relu, transformers_names=("relu2",)),
    "swiglu": Activation(F.silu, gated=True, transformers_names=("silu",)),
}


def by_transformers_name(*, gated: bool) -> dict[str, str]:
    """Names in config.json -> ours, of the activations that are gated, or of the others."""
    return {
        their: name
        for name, activation in ACTIVATIONS.items()
        if activation.gated == gated
        for their in activation.transformers_names
    }
