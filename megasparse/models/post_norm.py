"""A transformer block with normalisation after each residual sum, as in the first transformers (Post-LN).

    x = norm(x + attention(x))        with `model.residual_weight: admin` norm(omega * x + attention(x))
    x = norm(x + mlp(x))

The last block ends normalised, so that the head needs no normalisation of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.layers import MLP, AnyLayerCache, Attention, LayerFactory


class PostNormBlock(nn.Module):
    """Attention and MLP, each added to its input and then normalised. Arguments as for ``gpt.Block``."""

    def __init__(
        self, name: str, config: ModelConfig, attention: AttentionConfig, factory: LayerFactory, attention_kernel: str
    ) -> None:
        super().__init__()
        # Each sum is normalised, so no projection is scaled down by the depth.
        std = config.init_std
        self.attention = Attention(
            f"{name}.attention", config, attention, factory, output_std=std, kernel=attention_kernel
        )
        self.attention_sum = factory.residual_sum(config)
        self.attention_norm = factory.norm(config)
        self.mlp = MLP(f"{name}.mlp", config, factory, output_std=std)
        self.mlp_sum = factory.residual_sum(config)
        self.mlp_norm = factory.norm(config)

    def forward(
        self, x_BTC: torch.Tensor, documents_BT: torch.Tensor | None = None, cache: AnyLayerCache | None = None
    ) -> torch.Tensor:
        x_BTC = self.attention_norm(self.attention_sum(x_BTC, self.attention(x_BTC, documents_BT, cache=cache)))
        return self.mlp_norm(self.mlp_sum(x_BTC, self.mlp(x_BTC)))
