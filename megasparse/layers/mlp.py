"""The two-layer perceptron of a block: GELU (GPT-2) or SwiGLU (Llama; Shazeer, 2020, arXiv 2002.05202).

Tensor names: B samples, T tokens, C hidden size, F width inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.config.schema import ModelConfig
from megasparse.layers.factory import LayerFactory


class GeluMLP(nn.Module):
    """y = W_down gelu(W_up x), with the tanh approximation of GPT-2 or without."""

    def __init__(self, name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> None:
        super().__init__()
        C, width = config.hidden_size, config.mlp_width
        self.approximate = "none" if config.activation == "gelu_exact" else "tanh"
        self.up = factory.column(f"{name}.up", C, width, config.bias, config.init_std)
        self.down = factory.row(f"{name}.down", width, C, config.bias, output_std)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_BTC), approximate=self.approximate))


class SwigluMLP(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x); `gate_up` holds the rows of the gate, then those of up."""

    def __init__(self, name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> None:
        super().__init__()
        C, width = config.hidden_size, config.mlp_width
        self.gate_up = factory.column(f"{name}.gate_up", C, (width, width), config.bias, config.init_std)
        self.down = factory.row(f"{name}.down", width, C, config.bias, output_std)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTC).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


def mlp(name: str, config: ModelConfig, factory: LayerFactory, *, output_std: float) -> GeluMLP | SwigluMLP:
    """The perceptron for `config.activation`; `output_std` is the initial standard deviation of `down`."""
    kinds = {"gelu": GeluMLP, "gelu_exact": GeluMLP, "swiglu": SwigluMLP}
    return kinds[config.activation](name, config, factory, output_std=output_std)
