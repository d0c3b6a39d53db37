"""The attention patterns of hybrid sparse attention, exactly.

A query at position q sees a key at position k <= q (causal, always) where, for stride s and the offset o of the head,
0 <= o < s:

    full      always
    local     q - k < s
    strided   (q - k) mod s = o, or k = q
    sparse    local or strided
    fixed     q and k lie in the same block, or k is the last token of its block; block of p: (p + o) // s

Under ``fixed`` the last token of a block is seen by all later blocks, so it carries the summary of its block; the
offset shortens the first block to s - o tokens. ``full`` and ``local`` have no use for an offset. Every query sees at
least itself under every pattern.
"""

from __future__ import annotations

import torch

PATTERNS = ("full", "local", "strided", "sparse", "fixed")
WITH_OFFSET = ("strided", "sparse", "fixed")
"""Patterns that depend on the offset."""


def check_pattern(pattern: str, stride: int, offset: int = 0) -> None:
    """Raise ValueError unless `pattern` is one of `PATTERNS`, `stride` at least 1 and `offset` in [0, stride)."""
    if pattern not in PATTERNS:
        raise ValueError(f"attention pattern: {pattern!r} is unknown; must be one of {', '.join(PATTERNS)}")
    if stride < 1:
        raise ValueError(f"attention stride: {stride} is too small; must be 1 or more tokens")
    if not 0 <= offset < stride:
        raise ValueError(f"attention offset: {offset} is out of range; must be 0 to stride - 1 = {stride - 1}")


def pattern_mask(
    pattern: str, seq_length: int, stride: int, device: torch.device | str | None = None, offset: int = 0
) -> torch.Tensor:
    """The pattern as a bool tensor [seq_length, seq_length]: row = query, column = key, True = the query sees the key.

    Raises ValueError as `check_pattern`.
    """
    check_pattern(pattern, stride, offset)
    position = torch.arange(seq_length, device=device)
    query, key = position[:, None], position[None, :]
    distance = query - key
    causal = distance >= 0
    if pattern == "full":
        return causal
    if pattern == "fixed":
        query, key = query + offset, key + offset
        return causal & ((query // stride == key // stride) | (key % stride == stride - 1))
    local, strided = distance < stride, (distance % stride == offset) | (distance == 0)
    return causal & {"local": local, "strided": strided, "sparse": local | strided}[pattern]


def active_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Number of (query, key) pairs that the pattern keeps: `pattern_mask(...).sum()` without the mask.

    Raises ValueError as `check_pattern`.
    """
    check_pattern(pattern, stride, offset)
    if pattern == "full":
        return _triangle(seq_length)
    if pattern == "fixed":
        first = min(seq_length, stride - offset)
        blocks, rest = divmod(seq_length - first, stride)
        in_blocks = _triangle(first) + blocks * _triangle(stride) + _triangle(rest)
        # A query sees as many last tokens as there are blocks before its own.
        return in_blocks + _sum_of_floors(seq_length + offset, stride)
    window = min(seq_length, stride)
    local = _triangle(window) + (seq_length - window) * stride
    # Keys at the distances o + s, o + 2s, ...: besides distance o, which the window of `sparse` holds.
    after_offset = max(seq_length - offset, 0)
    far = _sum_of_floors(after_offset, stride)
    near = after_offset if offset else 0  # with offset 0 it is the query itself
    return {"local": local, "strided": seq_length + near + far, "sparse": local + far}[pattern]


def _sum_of_floors(n: int, stride: int) -> int:
    """Sum of floor(i / stride) over 0 <= i < n."""
    blocks, rest = divmod(n, stride)
    return stride * _triangle(blocks - 1) + rest * blocks


def visible_keys(pattern: str, position: int, stride: int, offset: int = 0) -> tuple[range, ...]:
    """The keys that the query at `position` sees: `pattern_mask(...)[position]` as ranges, ascending and disjoint.

    offset: o in [0, stride); strided keys are those with (q - k) mod s = o, and position p lies in block (p + o) // s,
    whose last token is the one with (p + o) mod s = s - 1. The query itself is always among the keys.

    Raises ValueError as `check_pattern`.
    """
    check_pattern(pattern, stride, offset)
    assert position >= 0, position
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
