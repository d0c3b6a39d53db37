"""Self-attention with fused query-key-value projection, grouped key-value heads and one pattern per head.

Rows of the fused projection: the H query heads, then the G key heads, then the G value heads, D rows each. The heads
are divided over the tensor-parallel ranks, each kind by itself.
Tensor names: B samples, T tokens, C hidden size, H query heads, G key-value heads (both of this rank), D head
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.hybrid_attention import attend_cached, check_pattern, hybrid_attention
from megasparse.layers.cache import AnyLayerCache, JoinedLayerCaches, LayerCache
from megasparse.layers.factory import LayerFactory
from megasparse.layers.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention of one block; `full` for every head until `set_patterns` is called.

    Args:
        name: name in the model, such as `layers.3.attention`.
        config, attention: shapes, and the stride of the patterns and its offsets.
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
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        ranks = factory.tensor_parallel
        self.local_heads, self.local_groups = self.num_heads // ranks.size, config.key_value_heads // ranks.size
        self.first_head = ranks.rank * self.local_heads
        self.rope_theta = config.rope_theta if config.position_embedding == "rope" else None
        self.rope_scaling = config.rope_scaling
        self.stride, self.kernel, self.elementwise = attention.stride, kernel, factory.elementwise
        self.offsets = attention.head_offsets(self.num_heads)
        self.patterns: tuple[str, ...] = ("full",) * self.num_heads
        widths = [heads * self.head_dim for heads in (self.num_heads, config.key_value_heads, config.key_value_heads)]
        self.local_widths = [width // ranks.size for width in widths]
        self.qkv = factory.column(f"{name}.qkv", config.hidden_size, widths, config.has_qkv_bias, config.init_std)
        self.output = factory.row(f"{name}.output", widths[0], config.hidden_size, config.bias, output_std)

    def set_patterns(self, patterns: Sequence[str]) -> None:
        """Set the pattern of each query head, those of other ranks included.

        Raises ValueError for a wrong count or an unknown name.
        """
        if isinstance(patterns, str) or len(patterns) != self.num_heads:
            raise ValueError(f"attention patterns: need one name for each of {self.num_heads} heads, got {patterns!r}")
        for pattern in patterns:
            check_pattern(pattern, self.stride)
        self.patterns = tuple(patterns)

    def forward(
        self,
        x_BTC: torch.Tensor,
        documents_BT: torch.Tensor | None = None,
        cache: AnyLayerCache | None = None,
    ) -> torch.Tensor:
        """documents_BT: see `hybrid_attention`. cache: what the tokens before these ones left; takes these ones too."""
        q, k, v = self.qkv(x_BTC).split(self.local_widths, dim=-1)
        B, T, _ = q.shape
        q_BHTD = q.view(B, T, self.local_heads, self.head_dim).transpose(1, 2)
        k_BGTD = k.view(B, T, self.local_groups, self.head_dim).transpose(1, 2)
        v_BGTD = v.view(B, T, self.local_groups, self.head_dim).transpose(1, 2)
        first = 0 if cache is None else cache.length
        if self.rope_theta is not None:
            q_BHTD, k_BGTD = (
                rotate(x, self.rope_theta, self.rope_scaling, first=first, kernel=self.elementwise)
                for x in (q_BHTD, k_BGTD)
            )
        if isinstance(cache, JoinedLayerCaches):
            tokens = zip(q_BHTD.split(1, dim=2), k_BGTD.split(1, dim=2), v_BGTD.split(1, dim=2), strict=True)
            texts = zip(tokens, cache.texts, strict=True)
            y_BHTD = torch.cat([self._attend(*qkv, None, text) for qkv, text in texts], dim=2)
        else:
            y_BHTD = self._attend(q_BHTD, k_BGTD, v_BGTD, documents_BT, cache)
        return self.output(y_BHTD.transpose(1, 2).flatten(2))

    def _attend(
        self,
        q_BHTD: torch.Tensor,
        k_BGTD: torch.Tensor,
        v_BGTD: torch.Tensor,
        documents_BT: torch.Tensor | None,
        cache: LayerCache | None,
    ) -> torch.Tensor:
        """Attention of turned queries, [B, H, T, D], to these keys and those of one cache."""
        own = slice(self.first_head, self.first_head + self.local_heads)
        patterns, offsets = self.patterns[own], self.offsets[own]
        if cache is not None:
            kept_k, kept_v = cache.store(k_BGTD, v_BGTD)
            if cache.length > 0:
                keys = kept_k, kept_v, patterns, self.stride, cache.length
                return attend_cached(q_BHTD, *keys, offsets=offsets)
        heads = patterns, self.stride, self.kernel
        return hybrid_attention(q_BHTD, k_BGTD, v_BGTD, *heads, documents_BT=documents_BT, offsets=offsets)
