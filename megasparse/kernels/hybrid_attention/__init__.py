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

from megasparse.kernels.hybrid_attention import cpu, parts, reference
from megasparse.kernels.hybrid_attention.patterns import PATTERNS, check_pattern, live_entries, pattern_mask

__all__ = [
    "PATTERNS",
    "check_kernel",
    "check_pattern",
    "executed_entries",
    "hybrid_attention",
    "live_entries",
    "pattern_mask",
    "select_kernel",
    "why_slow",
]


def _runs_everywhere(device: str, dtype: torch.dtype) -> None:
    return None


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute attention under one pattern, and the count of the scores that it computes.

    `why_not` says why it cannot run on a device type with a dtype (None where it can), and may build it;
    `why_not_planned` says what can be told without a build.
    """

    attend: Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, str, int, float | None, torch.Tensor | None], torch.Tensor
    ]
    executed_entries: Callable[[str, int, int], int]
    why_not: Callable[[str, torch.dtype], str | None] = _runs_everywhere
    why_not_planned: Callable[[str, torch.dtype], str | None] = _runs_everywhere


KERNELS: Mapping[str, AttentionKernel] = MappingProxyType(
    {
        "reference": AttentionKernel(reference.attend, reference.executed_entries),
        "parts": AttentionKernel(parts.attend, parts.executed_entries),
        "cpu": AttentionKernel(cpu.attend, cpu.executed_entries, cpu.why_not, cpu.why_not_planned),
    }
)

# Tokens from which `auto` prefers a kernel to a T x T mask; measured, see `benchmarks/hybrid_attention.py`.
FASTER_FROM = MappingProxyType({"cpu": 128, "parts": 512})


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
    shape = seq_length, stride, q_BHTD.device.type, q_BHTD.dtype
    chosen = {name: select_kernel(kernel, name, *shape) for name in dict.fromkeys(names)}
    if set(chosen.values()) == {"cpu"}:  # one call for heads of all patterns
        return cpu.attend(q_BHTD, k_BGTD, v_BGTD, names, stride, scale, documents_BT)
    attends = {name: KERNELS[kernel].attend for name, kernel in chosen.items()}
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


def executed_entries(
    kernel: str,
    pattern: str,
    seq_length: int,
    stride: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    planned: bool = False,
) -> int:
    """Attention scores that `kernel` computes per head and sequence under `pattern`, masked ones included."""
    chosen = select_kernel(kernel, pattern, seq_length, stride, device, dtype, planned=planned)
    return KERNELS[chosen].executed_entries(pattern, seq_length, stride)


def select_kernel(
    kernel: str,
    pattern: str,
    seq_length: int,
    stride: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    planned: bool = False,
) -> str:
    """The name in `KERNELS` that `kernel` stands for on a device type. planned: nothing is compiled.

    Raises ValueError where there is none, or it cannot run, and as `check_pattern`.
    """
    check_pattern(pattern, stride)
    if kernel != "auto":
        check_kernel(kernel, device, dtype, planned=planned)
        return kernel
    # Elsewhere nothing has been measured.
    if device == "cpu" and pattern != "full":
        for name, tokens in FASTER_FROM.items():
            if seq_length >= tokens and _why_not(name, device, dtype, planned) is None:
                return name
    return "reference"


def check_kernel(kernel: str, device: str, dtype: torch.dtype, *, planned: bool = False) -> None:
    """Raise ValueError unless `kernel` is `auto`, or a name in `KERNELS` that can run there."""
    if kernel != "auto" and kernel not in KERNELS:
        raise ValueError(
            f"hybrid_attention kernel: {kernel!r} is unknown; legal values: {', '.join(['auto', *KERNELS])}"
        )
    reason = None if kernel == "auto" else _why_not(kernel, device, dtype, planned)
    if reason is not None:
        able = ["auto", *(name for name in KERNELS if _why_not(name, device, dtype, planned) is None)]
        raise ValueError(
            f"hybrid_attention kernel: {kernel!r} cannot run: {reason}; legal values here: {', '.join(able)}"
        )


def why_slow(device: str, dtype: torch.dtype, *, planned: bool = False) -> str | None:
    """Why `auto` cannot take the compiled kernel on a CPU; None where it can, and on other devices."""
    return _why_not("cpu", device, dtype, planned) if device == "cpu" else None


def _why_not(kernel: str, device: str, dtype: torch.dtype, planned: bool) -> str | None:
    entry = KERNELS[kernel]
    return (entry.why_not_planned if planned else entry.why_not)(device, dtype)


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
