"""The two-layer perceptron of a block: plain (GPT-2) or gated (Llama; Shazeer, 2020, arXiv 2002.05202).

Tensor names: B samples, T tokens, C hidden size, F width inside.
"""

from __future__ import annotations

import torch
from torch import nn

from megasparse.config.schema import ModelConfig
from megasparse.layers.factory import LayerFactory
from megasparse.utils.activations import ACTIVATIONS


class MLP(nn.Module):
    """y = W_down f(W_up x)."""

    def __init__(self, name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> None:
        super().__init__()
        C, width = config.hidden_size, config.mlp_width
        self.activation = ACTIVATIONS[config.activation].function
        self.up = factory.column(f"{name}.up", C, width, config.bias, config.init_std)
        self.down = factory.row(f"{name}.down", width, C, config.bias, output_std)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x_BTC)))


class GatedMLP(nn.Module):
    """y = W_down (f(W_gate x) * W_up x); `gate_up` holds the rows of the gate, then those of up."""

    def __init__(self, name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> None:
        super().__init__()
        C, width = config.hidden_size, config.mlp_width
        self.activation = ACTIVATIONS[config.activation].function
        self.gate_up = factory.column(f"{name}.gate_up", C, (width, width), config.bias, config.init_std)
        self.down = factory.row(f"{name}.down", width, C, config.bias, output_std)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTC).chunk(2, dim=-1)
        return self.down(self.activation(gate_BTF) * up_BTF)


def mlp(name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> MLP | GatedMLP:
    """The perceptron for `config.activation`; `output_std` is the initial standard deviation of `down`."""
    kind: type[MLP | GatedMLP] = GatedMLP if ACTIVATIONS[config.activation].gated else MLP
    return kind(name, config, factory, output_std=output_std)
