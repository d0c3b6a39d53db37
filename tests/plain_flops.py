"""Exact FLOPs of a training step counted layer by layer, in the plainest way: what the ledger is compared with.

A multiply-add is 2 FLOPs. Only matrix products count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megasparse.layers import Attention, Linear, active_entries
from megasparse.models.gpt import GPT


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one forward and backward pass."""

    forward: int
    """Linear layers, head and low-rank branches included."""
    input_gradient: int
    """Gradients of the linear layers' inputs; the first layer's is needed too, for the embedding."""
    weight_gradient: int
    """Gradients of the linear layers' weights."""
    attention_forward: int
    """Scores and weighted sums."""
    attention_backward: int
    """Gradients of queries, keys, values and probabilities: four products, twice the forward pass."""

    @property
    def total(self) -> int:
        linear = self.forward + self.input_gradient + self.weight_gradient
        return linear + self.attention_forward + self.attention_backward


def count_flops(
    model: GPT,
    num_sequences: int,
    seq_length: int,
    *,
    densities: Mapping[str, float] | None = None,
    patterns: Sequence[Sequence[str]] | None = None,
    attention_entries: Callable[..., int] | None = None,
) -> FlopCount:
    """FLOPs of a forward and backward pass over `num_sequences` sequences of `seq_length` tokens.

    Args:
        model: any device; its masks and patterns are not looked at.
        densities: share of active weights by name of the sparse layer; layers left out are dense.
        patterns: one tuple of pattern names per layer, one name per query head; None: all `full`.
        attention_entries: (pattern, seq_length, stride, offset=) -> scores per head and sequence; None:
        `active_entries`.
    """
    densities = densities or {}
    tokens = num_sequences * seq_length
    forward = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear):
            continue
        dense = 2 * tokens * layer.in_features * layer.out_features
        side = 2 * tokens * layer.low_rank * (layer.in_features + layer.out_features)
        forward += round(dense * densities.get(name, 1.0)) + side
    attention = _attention_forward(model, num_sequences, seq_length, patterns, attention_entries or active_entries)
    return FlopCount(forward, forward, forward, attention, 2 * attention)


def _attention_forward(
    model: GPT,
    num_sequences: int,
    seq_length: int,
    patterns: Sequence[Sequence[str]] | None,
    entries: Callable[..., int],
) -> int:
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    if patterns is None:
        patterns = [("full",) * layer.num_heads for layer in layers]
    sizes = zip(layers, patterns, strict=True)
    return sum(attention_flops(layer, num_sequences, seq_length, heads, entries) for layer, heads in sizes)


def attention_flops(
    layer: Attention,
    num_sequences: int,
    seq_length: int,
    heads: Sequence[str],
    entries: Callable[..., int] = active_entries,
) -> int:
    """FLOPs of the scores and weighted sums of one layer, forward, with a pattern for each query head."""
    active = sum(
        entries(pattern, seq_length, layer.stride, offset=offset)
        for pattern, offset in zip(heads, layer.offsets, strict=True)
    )
    # Two products (scores, weighted sum), 2 FLOPs per entry and dimension each.
    return 4 * num_sequences * active * layer.head_dim
