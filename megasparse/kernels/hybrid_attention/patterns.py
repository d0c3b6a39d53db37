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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """What the reference kernel, the count of its work and generation need to know of a pattern."""

    sees: Callable[[Tensor, Tensor, int, int], Tensor]
    """(query positions, key positions, stride, offset) -> whether the query sees the key, where key <= query."""
    entries: Callable[[int, int, int], int]
    """(seq_length, stride, offset) -> number of pairs that it keeps, see `active_entries`."""
    visible_keys: Callable[[int, int, int], tuple[range, ...]]
    """(position, stride, offset) -> keys of that query, see `visible_keys`."""
    has_offset: bool = True
    """It depends on the offset."""


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
    return (key <= query) & PATTERNS[pattern].sees(query, key, stride, offset)


def active_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Number of (query, key) pairs that the pattern keeps: `pattern_mask(...).sum()` without the mask.

    Raises ValueError as `check_pattern`.
    """
    check_pattern(pattern, stride, offset)
    return PATTERNS[pattern].entries(seq_length, stride, offset)


def visible_keys(pattern: str, position: int, stride: int, offset: int = 0) -> tuple[range, ...]:
    """The keys that the query at `position` sees: `pattern_mask(...)[position]` as ranges, ascending and disjoint.

    offset: o in [0, stride); strided keys are those with (q - k) mod s = o, and position p lies in block (p + o) // s,
    whose last token is the one with (p + o) mod s = s - 1. The query itself is always among the keys.

    Raises ValueError as `check_pattern`.
    """
    check_pattern(pattern, stride, offset)
    assert position >= 0, position
    return PATTERNS[pattern].visible_keys(position, stride, offset)


def _window_keys(position: int, stride: int) -> range:
    return range(max(position + 1 - stride, 0), position + 1)


def _strided_keys(position: int, stride: int, offset: int) -> tuple[range, ...]:
    end = position + 1
    return _filled(range((position - offset) % stride, end - offset, stride), range(position if offset else end, end))


def _fixed_keys(position: int, stride: int, offset: int) -> tuple[range, ...]:
    block = max((position + offset) // stride * stride - offset, 0)
    return _filled(range(stride - 1 - offset, block, stride), range(block, position + 1))


def _sparse_keys(position: int, stride: int, offset: int) -> tuple[range, ...]:
    window = _window_keys(position, stride)
    return _filled(range((position - offset) % stride, window.start, stride), window)


def _filled(*ranges: range) -> tuple[range, ...]:
    return tuple(keys for keys in ranges if keys)


def _window_entries(seq_length: int, stride: int) -> int:
    window = min(seq_length, stride)
    return _triangle(window) + (seq_length - window) * stride


def _strided_entries(seq_length: int, stride: int, offset: int) -> int:
    # Besides the query itself: keys at distance o, which is the query where o is 0, and farther ones.
    near = max(seq_length - offset, 0) if offset else 0
    return seq_length + near + _far_entries(seq_length, stride, offset)


def _fixed_entries(seq_length: int, stride: int, offset: int) -> int:
    first = min(seq_length, stride - offset)
    blocks, rest = divmod(seq_length - first, stride)
    in_blocks = _triangle(first) + blocks * _triangle(stride) + _triangle(rest)
    # A query sees as many last tokens as there are blocks before its own.
    return in_blocks + _sum_of_floors(seq_length + offset, stride)


def _far_entries(seq_length: int, stride: int, offset: int) -> int:
    """Pairs at the distances o + s, o + 2s, ...: the window of `sparse` holds those at distance o."""
    return _sum_of_floors(max(seq_length - offset, 0), stride)


def _sum_of_floors(n: int, stride: int) -> int:
    """Sum of floor(i / stride) over 0 <= i < n."""
    blocks, rest = divmod(n, stride)
    return stride * _triangle(blocks - 1) + rest * blocks


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


PATTERNS: dict[str, Pattern] = {
    "full": Pattern(
        sees=lambda query, key, stride, offset: key <= query,
        entries=lambda seq_length, stride, offset: _triangle(seq_length),
        visible_keys=lambda position, stride, offset: (range(position + 1),),
        has_offset=False,
    ),
    "local": Pattern(
        sees=lambda query, key, stride, offset: query - key < stride,
        entries=lambda seq_length, stride, offset: _window_entries(seq_length, stride),
        visible_keys=lambda position, stride, offset: (_window_keys(position, stride),),
        has_offset=False,
    ),
    "strided": Pattern(
        sees=lambda query, key, stride, offset: ((query - key) % stride == offset) | (query == key),
        entries=_strided_entries,
        visible_keys=_strided_keys,
    ),
    "sparse": Pattern(
        sees=lambda query, key, stride, offset: (query - key < stride) | ((query - key) % stride == offset),
        entries=lambda length, stride, offset: _window_entries(length, stride) + _far_entries(length, stride, offset),
        visible_keys=_sparse_keys,
    ),
    "fixed": Pattern(
        sees=lambda query, key, stride, offset: (
            ((query + offset) // stride == (key + offset) // stride) | ((key + offset) % stride == stride - 1)
        ),
        entries=_fixed_entries,
        visible_keys=_fixed_keys,
    ),
}
