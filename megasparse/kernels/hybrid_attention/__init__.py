"""Hybrid sparse attention: causal softmax attention under one pattern per head.

Use ``hybrid_attention``; which kernel computes it is decided here and nowhere else. ``executed_entries`` tells how
many attention scores that kernel really computes, ``live_entries`` how many the pattern asks for.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from megasparse.kernels.hybrid_attention import parts, reference
from megasparse.kernels.hybrid_attention.cached import attend_cached
from megasparse.kernels.hybrid_attention.patterns import (
    PATTERNS,
    check_pattern,
    live_entries,
    pattern_mask,
    visible_keys,
)

__all__ = [
    "PATTERNS",
    "attend_cached",
    "check_pattern",
    "executed_entries",
    "hybrid_attention",
    "live_entries",
    "pattern_mask",
    "select_kernel",
    "visible_keys",
]


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute attention under one pattern, and the count of the scores that it computes."""

    attend: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, str, int, float | None, torch.Tensor | None], torch.Tensor
    ]
    executed_entries: Callable[[str, int, int], int]


KERNELS: Mapping[str, AttentionKernel] = MappingProxyType(
    {
        "reference": AttentionKernel(reference.attend, reference.executed_entries),
        "parts": AttentionKernel(parts.attend, parts.executed_entries),
    }
)

# Tokens from which `auto` prefers parts to a T x T mask; measured, see `benchmarks/hybrid_attention.py`.
FASTER_FROM = 512


def hybrid_attention(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    patterns: str | Sequence[str],
    stride: int,
    kernel: str = "auto",
    scale: float | None = None,
    documents_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal softmax attention in which each query head sees the keys of its pattern.

    Args:
        q_BHTD: queries, float32, bfloat16 or float16.
        k_BGTD, v_BGTD: keys and values; query head h uses key-value head h // (H / G).
        patterns: one name for all heads, or one name per query head; see `patterns.py` for their definition.
        stride: s of the patterns, in tokens.
        kernel: `auto` for the fastest one that supports the input, or a name from `KERNELS`.
        scale: factor of the scores before the softmax; None: 1 / sqrt(D).
        documents_BT: number of the document of each token, integers that never decrease along the tokens. No query
            sees a key of another document. Positions in the patterns stay those in the sequence: a document does
            not start new blocks or residues.

    Returns:
        [B, H, T, D] in the dtype of the queries.

    Raises:
        ValueError: unknown kernel or pattern, a count of patterns other than 1 or H, H not a multiple of G, or
            documents of another shape or type.
    """
    num_heads, num_groups = q_BHTD.shape[1], k_BGTD.shape[1]
    names = (patterns,) * num_heads if isinstance(patterns, str) else tuple(patterns)
    if len(names) != num_heads:
        raise ValueError(
            f"attention patterns: got {len(names)} for {num_heads} query heads; legal values: 1 name, or "
            f"{num_heads} names"
        )
    if num_heads % num_groups:
        raise ValueError(f"key-value heads: {num_groups} does not divide the {num_heads} query heads")
    seq_length = q_BHTD.shape[2]
    check_documents(documents_BT, q_BHTD.shape[0], seq_length)
    shape = seq_length, stride, q_BHTD.device.type
    attends = {name: KERNELS[select_kernel(kernel, name, *shape)].attend for name in dict.fromkeys(names)}
    if len(attends) == 1:
        return attends[names[0]](q_BHTD, k_BGTD, v_BGTD, names[0], stride, scale, documents_BT)

    # Heads of one pattern run together. Keys and values are repeated before the heads are picked, so that no index
    # occurs twice and the backward pass stays deterministic.
    k_BHTD, v_BHTD = repeat_heads(k_BGTD, num_heads), repeat_heads(v_BGTD, num_heads)
    order, outputs = [], []
    for name, attend in attends.items():
        heads = [head for head, pattern in enumerate(names) if pattern == name]
        index = torch.tensor(heads, device=q_BHTD.device)
        picked = (tensor.index_select(1, index) for tensor in (q_BHTD, k_BHTD, v_BHTD))
        outputs.append(attend(*picked, name, stride, scale, documents_BT))
        order += heads
    back = torch.tensor(order, device=q_BHTD.device).argsort()
    return torch.cat(outputs, dim=1).index_select(1, back)


def executed_entries(kernel: str, pattern: str, seq_length: int, stride: int, device: str = "cpu") -> int:
    """Attention scores that `kernel` computes per head and sequence under `pattern`, masked ones included."""
    chosen = select_kernel(kernel, pattern, seq_length, stride, device)
    return KERNELS[chosen].executed_entries(pattern, seq_length, stride)


def select_kernel(kernel: str, pattern: str, seq_length: int, stride: int, device: str = "cpu") -> str:
    """The name in `KERNELS` that `kernel` stands for on a device type.

    Raises ValueError where there is none, and as `check_pattern`.
    """
    check_pattern(pattern, stride)
    if kernel == "auto":
        # On GPUs parts have not been measured.
        faster = device == "cpu" and pattern != "full" and seq_length >= FASTER_FROM
        return "parts" if faster else "reference"
    if kernel not in KERNELS:
        raise ValueError(
            f"hybrid_attention kernel: {kernel!r} is unknown; legal values: {', '.join(['auto', *KERNELS])}"
        )
    return kernel


def check_documents(documents_BT: torch.Tensor | None, samples: int, seq_length: int) -> None:
    """Raise ValueError unless there is an integer for every token, or None."""
    if documents_BT is None:
        return
    if documents_BT.shape != (samples, seq_length) or documents_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention documents: got {documents_BT.dtype} of shape {list(documents_BT.shape)}; legal values: int32 "
            f"or int64 of shape {[samples, seq_length]}, or None"
        )


def repeat_heads(x_BGTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat each of the G heads for the query heads that share it: [B, G, T, D] -> [B, num_heads, T, D]."""
    B, G, T, D = x_BGTD.shape
    return x_BGTD[:, :, None].expand(B, G, num_heads // G, T, D).reshape(B, num_heads, T, D)
