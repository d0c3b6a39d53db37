"""Self-attention with fused query-key-value projection, grouped key-value heads and one pattern per head.

Rows of the fused projection: the H query heads, then the G key heads, then the G value heads, D rows each.
Tensor names: B samples, T tokens, C hidden size, H query heads, G key-value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.hybrid_attention import check_pattern, hybrid_attention
from megasparse.layers.factory import LayerFactory
from megasparse.layers.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention of one block; `full` for every head until `set_patterns` is called.

    Args:
        name: name in the model, such as `layers.3.attention`.
        config, attention: shapes, and the stride of the patterns.
        factory: makes the two projections.
        output_std: standard deviation of the initial output projection.
        kernel: kernel of `hybrid_attention`.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        attention: AttentionConfig,
        factory: LayerFactory,
        *,
        output_std: float,
        kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.num_groups, self.head_dim = (
            config.num_attention_heads,
            config.key_value_heads,
            config.head_dim,
        )
        self.rope_theta = config.rope_theta if config.position_embedding == "rope" else None
        self.stride, self.kernel = attention.stride, kernel
        self.patterns: tuple[str, ...] = ("full",) * self.num_heads
        widths = (self.num_heads * self.head_dim, self.num_groups * self.head_dim, self.num_groups * self.head_dim)
        self.widths = widths
        self.qkv = factory.linear(
            f"{name}.qkv", config.hidden_size, sum(widths), bias=config.bias, init_std=config.init_std
        )
        self.output = factory.linear(
            f"{name}.output", widths[0], config.hidden_size, bias=config.bias, init_std=output_std
        )

    def set_patterns(self, patterns: Sequence[str]) -> None:
        """Set the pattern of each query head. Raises ValueError for a wrong count or an unknown name."""
        if isinstance(patterns, str) or len(patterns) != self.num_heads:
            raise ValueError(f"attention patterns: need one name for each of {self.num_heads} heads, got {patterns!r}")
        for pattern in patterns:
            check_pattern(pattern, self.stride)
        self.patterns = tuple(patterns)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        B, T, _ = x_BTC.shape
        q, k, v = self.qkv(x_BTC).split(self.widths, dim=-1)
        q_BHTD = q.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k_BGTD = k.view(B, T, self.num_groups, self.head_dim).transpose(1, 2)
        v_BGTD = v.view(B, T, self.num_groups, self.head_dim).transpose(1, 2)
        if self.rope_theta is not None:
            q_BHTD, k_BGTD = rotate(q_BHTD, self.rope_theta), rotate(k_BGTD, self.rope_theta)
        y_BHTD = hybrid_attention(q_BHTD, k_BGTD, v_BGTD, self.patterns, self.stride, self.kernel)
        return self.output(y_BHTD.transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim))
