"""The plain count, with which the ledger is compared, against torch's FLOP counter on real passes and by hand."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from next_token import next_token_loss
from plain_flops import FlopCount, count_flops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.kernels.block_sparse import linear
from megasparse.kernels.hybrid_attention import active_entries, executed_entries
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models import GPT

B, T, V = 3, 16, 50
STYLES = {
    "gpt2": {},
    "llama": {
        "position_embedding": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
        "tie_embeddings": False, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    },
    "qwen2": {
        "position_embedding": "rope", "normalization": "rmsnorm", "activation": "swiglu", "bias": False,
        "qkv_bias": True, "attention_head_dim": 16, "num_key_value_heads": 2, "ffn_hidden_size": 96,
    },
}  # fmt: skip


def build(style="gpt2", rule=lambda name: SparseSpec(16) if "head" not in name else None, device="cpu") -> GPT:
    config = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=T, vocab_size_multiple=16, **STYLES[style]
    )
    with torch.device(device):
        return GPT(config, AttentionConfig(stride=4), V, LayerFactory(rule))


def square(pattern: str, seq_length: int, stride: int, offset: int) -> int:
    """Torch counts the whole square of scores."""
    return seq_length * seq_length


@pytest.mark.parametrize("low_rank", [0, 2])
@pytest.mark.parametrize("state", ["plain", "all active", "half active"])
@pytest.mark.parametrize("style", STYLES)
def test_matches_the_counter_of_torch(style, state, low_rank, monkeypatch) -> None:
    model = build(style, (lambda name: None) if state == "plain" else (lambda name: SparseSpec(16, low_rank)))
    if state == "half active":
        for layer in model.sparse_layers().values():
            layer.mask[:, ::2], layer.kernel = False, "dense"
            layer.topology_changed()
    # Operators of ours are opaque to the counter; the functions in them are not.
    for name in ("block_sparse_forward", "block_sparse_backward"):
        monkeypatch.setattr(linear, name, getattr(linear, name)._init_fn)
    tokens = torch.randint(V, (B, T))
    # Products by which a process tries its kernels, once, do not count.
    next_token_loss(model, tokens, tokens)
    # The plain products of the math back end: 2 forward, 4 backward; fused kernels recompute a fifth.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = next_token_loss(model, tokens, tokens)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    # Dense products do the whole work at any density.
    count = count_flops(model, B, T, attention_entries=square)
    # The loss makes both gradients of the head, and of the low-rank branch that ends there, in the forward pass.
    early = 2 * (2 * B * T * (model.head.in_features + model.head.low_rank) * model.head.out_features)
    assert forward.get_total_flops() == count.forward + count.attention_forward + early
    assert backward.get_total_flops() == count.input_gradient + count.weight_gradient + count.attention_backward - early
    assert forward.get_total_flops() + backward.get_total_flops() == count.total > 0


def test_dense_count_by_hand() -> None:
    count = count_flops(build(device="meta"), B, T)
    linear = 2 * B * T * (2 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 32 * 64)
    attention = 4 * B * 2 * 4 * (T * (T + 1) // 2) * 8
    assert count == FlopCount(linear, linear, linear, attention, 2 * attention)
    assert count.total == 3 * (linear + attention)


def test_densities() -> None:
    model = build()
    dense = count_flops(model, B, T)
    up = 2 * B * T * 32 * 128
    densities = {"layers.0.mlp.up": 0.25, "layers.1.mlp.up": 0.0}
    sparse = count_flops(model, B, T, densities=densities)
    saved = up * 3 // 4 + up
    assert sparse.forward == sparse.input_gradient == sparse.weight_gradient == dense.forward - saved
    assert sparse.attention_forward == dense.attention_forward


def test_side_paths_are_always_dense() -> None:
    rule = lambda low_rank: lambda name: SparseSpec(16, low_rank) if name == "layers.0.mlp.up" else None  # noqa: E731
    densities = {"layers.0.mlp.up": 0.5}
    without, with_path = (count_flops(build(rule=rule(low_rank)), B, T, densities=densities) for low_rank in (0, 3))
    assert with_path.forward - without.forward == 2 * B * T * 3 * (32 + 128)
    assert with_path.weight_gradient - without.weight_gradient == 2 * B * T * 3 * (32 + 128)


def test_patterns_by_layer_and_head() -> None:
    model = build("llama")
    patterns = [("full", "local", "sparse", "sparse"), ("fixed", "strided", "full", "full")]
    count = count_flops(model, B, T, patterns=patterns)
    entries = sum(active_entries(pattern, T, 4) for heads in patterns for pattern in heads)
    assert count.attention_forward == 4 * B * entries * 8
    assert count.attention_backward == 8 * B * entries * 8

    executed = count_flops(model, B, T, patterns=patterns, attention_entries=partial(executed_entries, "reference"))
    assert executed.attention_forward == 4 * B * (3 * T * (T + 1) // 2 + 5 * T * T) * 8
