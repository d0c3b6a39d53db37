"""Which keys a query reads, and attention of new tokens to kept keys and values, against masks and the reference."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.hybrid_attention import (
    PATTERNS,
    active_entries,
    attend_cached,
    hybrid_attention,
    pattern_mask,
    visible_keys,
)

MIXED = ("sparse", "full", "sparse", "local", "strided", "fixed")


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stride", [1, 2, 3, 5, 8, 40])
def test_the_visible_keys_are_the_row_of_the_mask(pattern, stride) -> None:
    T = 37
    rows = pattern_mask(pattern, T, stride)
    total = 0
    for position in range(T):
        ranges = visible_keys(pattern, position, stride)
        keys = [key for piece in ranges for key in piece]
        assert keys == rows[position].nonzero().flatten().tolist(), (position, ranges)
        assert all(len(piece) > 0 for piece in ranges)
        total += len(keys)
    assert total == active_entries(pattern, T, stride)


def sees(pattern: str, q: int, k: int, s: int, o: int) -> bool:
    """The definition with an offset, one pair at a time."""
    local, strided = q - k < s, (q - k) % s == o
    summary = (q + o) // s == (k + o) // s or (k + o) % s == s - 1
    seen = {"full": True, "local": local, "strided": strided, "sparse": local or strided, "fixed": summary}[pattern]
    return k == q or (k < q and seen)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_visible_keys_with_an_offset(pattern) -> None:
    for stride in (1, 2, 3, 7):
        for offset in range(stride):
            for position in range(25):
                keys = [key for piece in visible_keys(pattern, position, stride, offset) for key in piece]
                expected = [k for k in range(position + 1) if sees(pattern, position, k, stride, offset)]
                assert keys == expected, (stride, offset, position)


def test_bad_patterns_are_named() -> None:
    with pytest.raises(ValueError, match="'lokal'.*full, local, strided, sparse, fixed"):
        visible_keys("lokal", 3, 4)
    with pytest.raises(ValueError, match="stride: 0"):
        visible_keys("local", 3, 0)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("patterns", [MIXED, *((pattern,) * 6 for pattern in PATTERNS)], ids=str)
def test_new_tokens_get_what_the_whole_sequence_gives_them(patterns, groups) -> None:
    T, stride = 23, 4
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64) for heads in (6, groups, groups))
    expected = hybrid_attention(q, k, v, patterns, stride, "reference")
    # What lies behind the new tokens must not be read.
    kept = [torch.nn.functional.pad(x, (0, 0, 0, 5), value=torch.nan) for x in (k, v)]
    for first in (1, 3, 4, 7, 8, 15, 21, 22):
        got = attend_cached(q[:, :, first:], *kept, patterns, stride, first)
        torch.testing.assert_close(got, expected[:, :, first:])


def test_each_head_has_its_own_offset() -> None:
    T, stride, offsets = 19, 5, (0, 3, 4, 1, 2, 2)
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64) for heads in (6, 2, 2))
    masks = [
        [[sees(name, position, key, stride, o) for key in range(T)] for position in range(T)]
        for name, o in zip(MIXED, offsets, strict=True)
    ]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, torch.tensor(masks), enable_gqa=True)
    got = attend_cached(q[:, :, 1:], k, v, MIXED, stride, 1, offsets=offsets)
    torch.testing.assert_close(got, expected[:, :, 1:])
