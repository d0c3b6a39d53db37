"""The attention patterns of hybrid sparse attention, exactly.

A query at position q sees a key at position k <= q (causal, always) where, for stride s:

    full      always
    local     q - k < s
    strided   (q - k) mod s = 0
    sparse    local or strided
    fixed     q and k lie in the same block of s tokens, or k is the last token of its block

Under ``fixed`` the last token of a block is seen by all later blocks, so it carries the summary of its block.
Every query sees at least itself under every pattern.
"""

from __future__ import annotations

import torch

PATTERNS = ("full", "local", "strided", "sparse", "fixed")


def check_pattern(pattern: str, stride: int) -> None:
    """Raise ValueError unless `pattern` is one of `PATTERNS` and `stride` is at least 1."""
    if pattern not in PATTERNS:
        raise ValueError(f"attention pattern: {pattern!r} is unknown; legal values: {', '.join(PATTERNS)}")
    if stride < 1:
        raise ValueError(f"attention stride: {stride} is too small; legal values: 1 or more tokens")


def pattern_mask(pattern: str, seq_length: int, stride: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The pattern as a bool tensor [seq_length, seq_length]: row = query, column = key, True = the query sees the key.

    Raises ValueError for an unknown pattern or a stride below 1.
    """
    check_pattern(pattern, stride)
    position = torch.arange(seq_length, device=device)
    query, key = position[:, None], position[None, :]
    distance = query - key
    causal = distance >= 0
    if pattern == "full":
        return causal
    if pattern == "fixed":
        return causal & ((query // stride == key // stride) | (key % stride == stride - 1))
    local, strided = distance < stride, distance % stride == 0
    return causal & {"local": local, "strided": strided, "sparse": local | strided}[pattern]


def live_entries(pattern: str, seq_length: int, stride: int) -> int:
    """Number of (query, key) pairs that `pattern` keeps: `pattern_mask(...).sum()` without the mask.

    Raises ValueError for an unknown pattern or a stride below 1.
    """
    check_pattern(pattern, stride)
    blocks, rest = divmod(seq_length, stride)
    # Sum of floor(q / s) over all queries: whole blocks before the own one, which is both the number of strided keys
    # besides the query itself and the number of last columns under `fixed`.
    earlier_blocks = stride * _triangle(blocks - 1) + rest * blocks
    if pattern == "full":
        return _triangle(seq_length)
    if pattern == "fixed":
        return blocks * _triangle(stride) + _triangle(rest) + earlier_blocks
    window = min(seq_length, stride)
    local = _triangle(window) + (seq_length - window) * stride
    # The window and the strided keys share only the query itself.
    return {"local": local, "strided": seq_length + earlier_blocks, "sparse": local + earlier_blocks}[pattern]


def visible_keys(pattern: str, position: int, stride: int, offset: int = 0) -> tuple[range, ...]:
    """The keys that the query at `position` sees: `pattern_mask(...)[position]` as ranges, ascending and disjoint.

    offset: o in [0, stride); strided keys are those with (q - k) mod s = o, and position p lies in block (p + o) // s,
    whose last token is the one with (p + o) mod s = s - 1. The query itself is always among the keys.

    Raises ValueError for an unknown pattern or a stride below 1.
    """
    check_pattern(pattern, stride)
    assert 0 <= offset < stride and position >= 0, (position, stride, offset)
    end = position + 1
    if pattern == "full":
        return (range(end),)
    if pattern == "fixed":
        block = max((position + offset) // stride * stride - offset, 0)
        return _filled(range(stride - 1 - offset, block, stride), range(block, end))
    window = range(max(end - stride, 0), end)
    if pattern == "local":
        return (window,)
    first = (position - offset) % stride
    if pattern == "sparse":
        return _filled(range(first, window.start, stride), window)
    return _filled(range(first, end - offset, stride), range(position if offset else end, end))


def _filled(*ranges: range) -> tuple[range, ...]:
    return tuple(keys for keys in ranges if keys)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
