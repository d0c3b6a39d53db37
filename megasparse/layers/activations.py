"""The activations of the perceptron: the one table that layers, costs and plans read.

    activation = ACTIVATIONS[config.model.activation]

A new one is an entry here and a name in ``ModelConfig.activation``.
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

    @property
    def inner_tensors(self) -> int:
        """Tensors of the inner width that the forward pass reads and writes, and that the backward pass needs."""
        return 3 if self.gated else 2


ACTIVATIONS = {
    "gelu": Activation(partial(F.gelu, approximate="tanh")),
    "gelu_exact": Activation(F.gelu),
    "swiglu": Activation(F.silu, gated=True),
}
