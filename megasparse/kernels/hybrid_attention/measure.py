"""Measures a kernel of hybrid sparse attention against a boolean mask and dense causal attention.

    rows = measure_rows("tiled", "cpu", torch.float32, stride=128, head_dim=64)

The patterns take turns with the other two (``common.medians``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from megasparse.kernels.common.medians import medians, training_pass
from megasparse.kernels.hybrid_attention import KERNELS, hybrid_attention
from megasparse.kernels.hybrid_attention.break_even import Row
from megasparse.kernels.hybrid_attention.patterns import PATTERNS, pattern_mask
from megasparse.utils.dtypes import dtype_name

LENGTHS = (128, 256, 512, 1024, 2048)
HEADS = 4
"""At the least; on CPUs as many as there are threads, since one thread computes a head. Times grow linearly with
more."""


def measure_rows(
    kernel: str,
    device: str,
    dtype: torch.dtype,
    *,
    stride: int,
    head_dim: int,
    lengths: Sequence[int] = LENGTHS,
    heads: int | None = None,
    rounds: int = 3,
    patterns: Sequence[str] | None = None,
    fastest: bool = False,
) -> list[Row]:
    """One row for each of the patterns that the kernel computes.

    patterns: None: all that there are, `full` only where `auto` may take the kernel for it. For `full` alone no mask is
    measured; its time is that of dense attention. fastest: see ``medians``.
    """
    asked = [name for name in PATTERNS if name != "full" or kernel == "cpu"] if patterns is None else patterns
    patterns = [pattern for pattern in asked if KERNELS[kernel].computes(pattern)]
    heads = heads or (HEADS if device == "cuda" else max(HEADS, torch.get_num_threads()))
    seconds: dict[str, dict[str, dict[str, float]]] = {pattern: {} for pattern in patterns}
    host: dict[str, dict[str, dict[str, float]]] = {pattern: {} for pattern in patterns}
    for seq_length in sorted(set(lengths)):
        # Heads of a token lie together, as the projection of a layer leaves them.
        shape = 1, seq_length, heads, head_dim
        q, k, v, dy = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(4))
        attentions = [
            partial(F.scaled_dot_product_attention, is_causal=True),
            *(partial(hybrid_attention, patterns=pattern, stride=stride, kernel=kernel) for pattern in patterns),
        ]
        if set(patterns) != {"full"}:
            # The work of a mask is the same under every pattern.
            mask = pattern_mask("sparse", seq_length, stride, device)
            attentions.append(partial(F.scaled_dot_product_attention, attn_mask=mask))
        passes = [training_pass(each, (q, k, v), dy) for each in attentions]
        dense, *others = medians(passes, device, rounds, fastest=fastest)
        ours, masked = others[: len(patterns)], (others[len(patterns) :] or [dense])[0]
        for pattern, own in zip(patterns, ours, strict=True):
            times = {"kernel": own, "mask": masked, "dense": dense}
            seconds[pattern][str(seq_length)] = {name: round(value.device, 7) for name, value in times.items()}
            if device == "cuda":
                host[pattern][str(seq_length)] = {name: round(value.host, 7) for name, value in times.items()}
    return [
        Row(kernel, dtype_name(dtype), pattern, stride, head_dim, heads, seconds[pattern], host[pattern])
        for pattern in patterns
    ]
