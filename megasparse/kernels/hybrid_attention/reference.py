"""Reference kernel of hybrid sparse attention: exact, any device and dtype, saves no work on masked patterns.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from megasparse.kernels.hybrid_attention.patterns import active_entries, pattern_mask


def attend(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    patterns: Sequence[str],
    stride: int,
    documents_BT: torch.Tensor | None,
    offsets: Sequence[int],
) -> torch.Tensor:
    """Softmax attention, all heads with one pattern and offset. Returns [B, H, T, D] in the dtype of `q_BHTD`."""
    pattern, offset = patterns[0], offsets[0]
    grouped = q_BHTD.shape[1] != k_BGTD.shape[1]
    if pattern == "full" and documents_BT is None:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=grouped)
    mask = mask_of(pattern, q_BHTD.shape[2], stride, q_BHTD.device, offset)
    if documents_BT is not None:
        mask = mask & (documents_BT[:, None, :, None] == documents_BT[:, None, None, :])
    return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, attn_mask=mask, enable_gqa=grouped)


def executed_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Scores computed per head: the causal kernel skips the upper half, a boolean mask skips nothing."""
    return active_entries(pattern, seq_length, stride, offset) if pattern == "full" else seq_length * seq_length


def mask_of(pattern: str, seq_length: int, stride: int, device: torch.device, offset: int) -> torch.Tensor:
    """`pattern_mask`, from a cache where that holds it."""
    # A compiler makes the mask part of its graph: it cannot see what a cache holds.
    if torch.compiler.is_compiling() or (offset and seq_length > LONGEST_CACHED_WITH_OFFSET):
        return pattern_mask(pattern, seq_length, stride, device, offset)
    if offset:
        return cached_offset_mask(pattern, seq_length, stride, device, offset)
    return cached_mask(pattern, seq_length, stride, device)


def _made_mask(pattern: str, seq_length: int, stride: int, device: torch.device, offset: int = 0) -> torch.Tensor:
    # A mask first built under inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        return pattern_mask(pattern, seq_length, stride, device, offset)


# A model uses one or two patterns at one or two lengths; a mask of 8,192 tokens takes 64 MiB, hence the small bound.
cached_mask = lru_cache(maxsize=8)(_made_mask)

# Every head of a layer can have an offset of its own: many masks, so only short ones, of up to 1 MiB, are kept.
cached_offset_mask = lru_cache(maxsize=64)(_made_mask)
LONGEST_CACHED_WITH_OFFSET = 1024
