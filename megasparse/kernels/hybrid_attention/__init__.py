"""Hybrid sparse attention: causal softmax attention under one pattern per head.

Use ``hybrid_attention``; which kernel computes it is decided here and nowhere else. ``executed_entries`` tells how
many attention scores that kernel really computes, ``active_entries`` how many the pattern asks for, ``widened`` which
patterns give way to dense attention where the user allows it.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from megasparse.kernels.hybrid_attention import break_even, causal, cpu, gpu, operators, reference
from megasparse.kernels.hybrid_attention.cached import attend_cached
from megasparse.kernels.hybrid_attention.heads import kept_on_device
from megasparse.kernels.hybrid_attention.patterns import (
    PATTERNS,
    active_entries,
    check_pattern,
    pattern_mask,
    visible_keys,
)

__all__ = [
    "PATTERNS",
    "attend_cached",
    "check_forced",
    "check_pattern",
    "executed_entries",
    "fast_kernel",
    "hybrid_attention",
    "active_entries",
    "pattern_mask",
    "select_kernel",
    "visible_keys",
    "why_slow",
    "widened",
]


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute attention, and the count of the scores that it computes."""

    attend: Callable[..., torch.Tensor]
    """(queries, keys, values, patterns, stride, documents, offsets) -> outputs, with a pattern and an offset for each
    query head. Scores are scaled by 1 / sqrt(D)."""
    executed_entries: Callable[[str, int, int, int], int]
    """(pattern, seq_length, stride, offset) -> scores."""
    patterns: tuple[str, ...] | None = None
    """Those that it computes; None: all, also those that others add to `PATTERNS`."""
    joins_patterns: bool = False
    """One call takes heads of different patterns."""
    joins_offsets: bool = False
    """One call takes heads of different offsets."""
    why_not: Callable[[str, torch.dtype, int, bool], str | None] = lambda device, dtype, head_dim, planned: None
    """Why it cannot run on (device type, dtype, head_dim), or None; it may be built for that, unless it is planned."""

    def computes(self, pattern: str) -> bool:
        return self.patterns is None or pattern in self.patterns


FAST = {name: (partial(operators.attend, name), each.executed_entries) for name, each in operators.BACKENDS.items()}
KERNELS: Mapping[str, AttentionKernel] = MappingProxyType(
    {
        "reference": AttentionKernel(reference.attend, reference.executed_entries),
        "tiled": AttentionKernel(*FAST["tiled"], operators.PATTERNS),
        "causal": AttentionKernel(causal.attend, active_entries, ("full",)),
        "cpu": AttentionKernel(*FAST["cpu"], operators.PATTERNS, True, True, cpu.why_not),
        "triton": AttentionKernel(*FAST["triton"], operators.PATTERNS, False, True, gpu.why_not),
    }
)


def hybrid_attention(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTD: torch.Tensor,
    patterns: str | Sequence[str],
    stride: int,
    kernel: str = "auto",
    documents_BT: torch.Tensor | None = None,
    *,
    offsets: int | Sequence[int] = 0,
) -> torch.Tensor:
    """Causal softmax attention in which each query head sees the keys of its pattern; scores are scaled by 1 / sqrt(D).

    Args:
        q_BHTD: queries, float32, bfloat16 or float16.
        k_BGTD, v_BGTD: keys and values; query head h uses key-value head h // (H / G).
        patterns: one name for all heads, or one name per query head; see `patterns.py` for their definition.
        stride: s of the patterns, in tokens.
        kernel: `auto` for the fastest one that supports the input, or a name from `KERNELS`.
        documents_BT: number of the document of each token, integers that never decrease along the tokens. No query
            sees a key of another document. Positions in the patterns stay those in the sequence: a document does
            not start new blocks or residues.
        offsets: offset of the stride, one for all heads, or one per query head.

    Returns:
        [B, H, T, D] in the dtype of the queries.

    Raises:
        ValueError: unknown kernel or pattern, a count of patterns or offsets other than 1 or H, an offset outside
            [0, stride), H not a multiple of G, or documents of another shape or type.
    """
    num_heads, num_groups, seq_length = q_BHTD.shape[1], k_BGTD.shape[1], q_BHTD.shape[2]
    names = _per_head("patterns", patterns, str, num_heads)
    shifts = _per_head("offsets", offsets, int, num_heads)
    if num_heads % num_groups:
        raise ValueError(f"key-value heads: {num_groups} does not divide the {num_heads} query heads")
    check_documents(documents_BT, q_BHTD.shape[0], seq_length)
    shape = stride, q_BHTD.device.type, q_BHTD.dtype, q_BHTD.shape[3]
    masked = documents_BT is not None
    chosen = {name: select_kernel(kernel, name, seq_length, *shape, documents=masked) for name in set(names)}
    together: dict[tuple, list[tuple[int, str, int]]] = {}
    for head, (name, shift) in enumerate(zip(names, shifts, strict=True)):
        check_pattern(name, stride, shift)
        offset, able = shift if PATTERNS[name].has_offset else 0, KERNELS[chosen[name]]
        kind = chosen[name], None if able.joins_patterns else name, None if able.joins_offsets else offset
        together.setdefault(kind, []).append((head, name, offset))
    tensors = q_BHTD, k_BGTD, v_BGTD
    if len(together) == 1:
        (((runs, *_), members),) = together.items()
        _, names, shifts = zip(*members, strict=True)
        return KERNELS[runs].attend(*tensors, names, stride, documents_BT, shifts)
    # Heads that one call can take run together. Keys and values are repeated before the heads are picked, so that no
    # index occurs twice and the backward pass stays deterministic.
    tensors = q_BHTD, repeat_heads(k_BGTD, num_heads), repeat_heads(v_BGTD, num_heads)
    order: list[int] = []
    outputs = []
    for (runs, *_), members in together.items():
        heads, names, shifts = zip(*members, strict=True)
        index = _head_index(heads, q_BHTD.device)
        own = (tensor.index_select(1, index) for tensor in tensors)
        outputs.append(KERNELS[runs].attend(*own, names, stride, documents_BT, shifts))
        order += heads
    back = _head_index(tuple(sorted(range(num_heads), key=order.__getitem__)), q_BHTD.device)
    return torch.cat(outputs, dim=1).index_select(1, back)


def executed_entries(
    kernel: str,
    pattern: str,
    seq_length: int,
    stride: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    *,
    offset: int = 0,
    planned: bool = False,
) -> int:
    """Attention scores that `kernel` computes per head and sequence under `pattern`, masked ones included."""
    chosen = select_kernel(kernel, pattern, seq_length, stride, device, dtype, head_dim, planned=planned)
    return KERNELS[chosen].executed_entries(pattern, seq_length, stride, offset if PATTERNS[pattern].has_offset else 0)


def select_kernel(
    kernel: str,
    pattern: str,
    seq_length: int,
    stride: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    *,
    documents: bool = False,
    planned: bool = False,
) -> str:
    """The name in `KERNELS` that `kernel` stands for on a device type.

    documents: they bound what queries see. planned: nothing is compiled, and the device need not be there.
    Raises ValueError where there is none, or a forced one cannot run, and as `check_pattern`.
    """
    check_pattern(pattern, stride)
    if kernel == "auto":
        if pattern == "full" and not (documents and device == "cuda"):
            return full_kernel(device, dtype, head_dim, seq_length, documents=documents, planned=planned)
        # First without a build: nothing is compiled, in the midst of a step perhaps, that would not be used.
        for unbuilt in (True, planned):
            fast = fast_kernel(device, dtype, head_dim, pattern=pattern, planned=unbuilt)
            limit = break_even.mask_limit(fast, pattern, stride, device, dtype, head_dim)
            if pattern != "full" and seq_length < limit:
                return "reference"
        # On GPUs documents cannot be cut apart without waiting for the device.
        return "causal" if pattern == "full" and fast != "triton" else fast
    if kernel not in KERNELS:
        raise ValueError(
            f"hybrid_attention kernel: {kernel!r} is unknown; must be one of {', '.join(['auto', *KERNELS])}"
        )
    if not KERNELS[kernel].computes(pattern):
        able = ["auto", *(name for name, other in KERNELS.items() if other.computes(pattern))]
        raise ValueError(
            f"hybrid_attention kernel: {kernel!r} does not compute the pattern {pattern!r}; must be {', '.join(able)}"
        )
    check_forced(kernel, device, dtype, head_dim, planned=planned)
    return kernel


def check_forced(kernel: str, device: str, dtype: torch.dtype, head_dim: int, *, planned: bool = False) -> None:
    """Raise ValueError where a kernel that was asked for by name cannot run."""
    place = device, dtype, head_dim, planned
    reason = KERNELS[kernel].why_not(*place) if kernel in KERNELS else None
    if reason is not None:
        whole = {name: other for name, other in KERNELS.items() if name != "causal"}
        able = ["auto", *(name for name, other in whole.items() if other.why_not(*place) is None)]
        raise ValueError(f"hybrid_attention kernel: {kernel!r} cannot run: {reason}; here it must be {', '.join(able)}")


def widened(
    kernel: str,
    patterns: Sequence[str],
    seq_length: int,
    stride: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> tuple[str, ...]:
    """`patterns` with `full` in place of those that dense causal attention was measured to be faster than.

    Only `auto` widens, and nothing is widened where nobody measured.
    """
    if kernel != "auto":
        return tuple(patterns)
    shape = device, dtype, head_dim
    fast = {name: fast_kernel(*shape, pattern=name, planned=True) for name in set(patterns)}
    limits = {name: break_even.dense_limit(kernel, name, stride, *shape) for name, kernel in fast.items()}
    return tuple("full" if seq_length < limits[name] else name for name in patterns)


def full_kernel(
    device: str, dtype: torch.dtype, head_dim: int, seq_length: int, *, documents: bool = False, planned: bool = False
) -> str:
    """What `auto` takes for `full`: torch's causal kernel, or ours for CPUs where it was measured to be faster.

    With documents ours is taken: torch's has to be called for each of them.
    """
    shape = device, dtype, head_dim
    wins = documents and seq_length >= break_even.SHORTEST_FULL
    if device == "cpu" and (wins or break_even.computes_full_faster("cpu", *shape, seq_length)):
        return "cpu" if KERNELS["cpu"].why_not(*shape, planned) is None else "causal"
    return "causal"


def fast_kernel(
    device: str, dtype: torch.dtype, head_dim: int, *, pattern: str = "sparse", planned: bool = False
) -> str:
    """What `auto` prefers to a boolean mask, from the measured number of tokens on; `reference` where nothing."""
    for name in ("triton" if device == "cuda" else "cpu", "tiled"):
        kernel = KERNELS[name]
        if kernel.computes(pattern) and kernel.why_not(device, dtype, head_dim, planned) is None:
            return name
    return "reference"


def why_slow(device: str, dtype: torch.dtype, head_dim: int, *, planned: bool = False) -> str | None:
    """Why `auto` cannot take the compiled kernel on a CPU; None where it can, and on other devices."""
    return KERNELS["cpu"].why_not(device, dtype, head_dim, planned) if device == "cpu" else None


def check_documents(documents_BT: torch.Tensor | None, samples: int, seq_length: int) -> None:
    """Raise ValueError unless there is an integer for every token, or None."""
    if documents_BT is None:
        return
    if documents_BT.shape != (samples, seq_length) or documents_BT.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"attention documents: got {documents_BT.dtype} of shape {list(documents_BT.shape)}; must be one of int32 "
            f"or int64 of shape {[samples, seq_length]}, or None"
        )


def repeat_heads(x_BGTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Repeat each of the G heads for the query heads that share it: [B, G, T, D] -> [B, num_heads, T, D]."""
    B, G, T, D = x_BGTD.shape
    return x_BGTD[:, :, None].expand(B, G, num_heads // G, T, D).reshape(B, num_heads, T, D)


def _head_index(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    make = torch.tensor if torch.compiler.is_compiling() else kept_on_device
    return make(heads, dtype=torch.int64, device=device)


def _per_head(what: str, given: Any, single: type, num_heads: int) -> tuple:
    """One value for each query head."""
    values = (given,) * num_heads if isinstance(given, single) else tuple(given)
    if len(values) != num_heads:
        raise ValueError(
            f"attention {what}: got {len(values)} for {num_heads} query heads; must be 1 for all, or {num_heads}"
        )
    return values
