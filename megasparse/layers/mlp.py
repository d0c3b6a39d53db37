"""The two-layer perceptron of a block: plain (GPT-2) or gated (Llama; Shazeer, 2020, arXiv 2002.05202).

Tensor names: B samples, T tokens, C hidden size, F width inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from megasparse.config.schema import ModelConfig
from megasparse.kernels.elementwise import activation
from megasparse.layers.factory import LayerFactory
from megasparse.layers.fused_pair import fused_pair
from megasparse.utils.activations import ACTIVATIONS


class MLP(nn.Module):
    """y = W_down f(W_up x), or where the activation is gated W_down (f(W_gate x) * W_up x).

    `gate_up` holds the rows of the gate, then those of up. output_std: standard deviation of the initial `down`.
    """

    def __init__(self, name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> None:
        super().__init__()
        C, width, bias, std = config.hidden_size, config.mlp_width, config.bias, config.init_std
        kind = ACTIVATIONS[config.activation]
        self.gated = kind.gated
        self.activation = activation(config.activation, kind.function, gated=kind.gated, kernel=factory.elementwise)
        self._fused = partial(fused_pair, activation=config.activation, kernel=factory.elementwise)
        if self.gated:
            self.gate_up = factory.column(f"{name}.gate_up", C, (width, width), bias, std)
        else:
            self.up = factory.column(f"{name}.up", C, width, bias, std)
        self.down = factory.row(f"{name}.down", width, C, bias, output_std)
        self.in_training: Callable[[MLP, torch.Tensor], torch.Tensor] | None = None
        """What computes it in training in place of the equation above, of x [B, T, C]; a training method sets it."""

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        if self.training and self.in_training is not None:
            return self.in_training(self, x_BTC)
        if self.gated:
            return self.down(self.activation(self.gate_up(x_BTC)))
        y_BTC = self._fused(self.up, self.down, x_BTC)
        return self.down(self.activation(self.up(x_BTC))) if y_BTC is None else y_BTC
