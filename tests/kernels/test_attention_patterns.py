"""The pattern definitions against a definition one pair at a time, and the closed-form counts against the masks."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.hybrid_attention import PATTERNS, active_entries, executed_entries, pattern_mask


def sees(pattern: str, q: int, k: int, s: int, o: int = 0) -> bool:
    """The definition of the design, one pair at a time."""
    if k > q:
        return False
    if pattern == "full":
        return True
    if pattern == "local":
        return q - k < s
    if pattern == "strided":
        return (q - k) % s == o or k == q
    if pattern == "sparse":
        return q - k < s or (q - k) % s == o
    first_of_block = (q + o) // s * s - o
    return first_of_block <= k < first_of_block + s or (k + o) % s == s - 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("seq_length", "stride"), [(1, 1), (7, 1), (12, 3), (13, 4), (5, 8), (16, 16), (17, 16)])
def test_mask_is_the_definition(pattern: str, seq_length: int, stride: int) -> None:
    mask = pattern_mask(pattern, seq_length, stride, "cpu")
    assert mask.dtype == torch.bool
    expected = [[sees(pattern, q, k, stride) for k in range(seq_length)] for q in range(seq_length)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("seq_length", "stride"), [(1, 3), (12, 3), (13, 4), (5, 8), (16, 16), (17, 16)])
def test_mask_with_an_offset_is_the_definition(pattern: str, seq_length: int, stride: int) -> None:
    for offset in range(stride):
        mask = pattern_mask(pattern, seq_length, stride, offset=offset)
        expected = [[sees(pattern, q, k, stride, offset) for k in range(seq_length)] for q in range(seq_length)]
        assert mask.tolist() == expected, offset
        assert mask.diagonal().all()


def test_offsets_spread_the_keys_of_heads_over_all_tokens() -> None:
    """With every offset once, the heads together see everything."""
    seen = torch.stack([pattern_mask("strided", 20, 4, offset=offset) for offset in range(4)]).any(0)
    assert torch.equal(seen, pattern_mask("full", 20, 4))
    assert torch.equal(pattern_mask("local", 20, 4, offset=3), pattern_mask("local", 20, 4))


def test_patterns_differ() -> None:
    masks = {pattern: pattern_mask(pattern, 24, 4) for pattern in PATTERNS}
    assert len({tuple(mask.flatten().tolist()) for mask in masks.values()}) == len(PATTERNS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_active_entries_is_the_sum_of_the_mask(pattern: str) -> None:
    for seq_length in [*range(1, 35), 64, 100, 127]:
        for stride in [*range(1, 12), 16, 31, 64, 128]:
            for offset in {0, 1, stride // 2, stride - 1} & set(range(stride)):
                expected = int(pattern_mask(pattern, seq_length, stride, offset=offset).sum())
                assert active_entries(pattern, seq_length, stride, offset) == expected, (seq_length, stride, offset)


def test_reference_executes_half_of_full_and_all_of_a_mask() -> None:
    assert executed_entries("reference", "full", 10, 4) == 55
    assert {executed_entries("auto", pattern, 10, 4) for pattern in PATTERNS if pattern != "full"} == {100}


@pytest.mark.parametrize("call", [lambda: active_entries("lokal", 8, 2), lambda: pattern_mask("lokal", 8, 2)])
def test_unknown_pattern_names_the_possible_ones(call) -> None:
    with pytest.raises(ValueError, match="'lokal'.*full, local, strided, sparse, fixed"):
        call()


def test_stride_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="stride: 0"):
        active_entries("local", 8, 0)


@pytest.mark.parametrize("offset", [-1, 4])
def test_an_offset_outside_of_the_stride_is_refused(offset: int) -> None:
    for call in (active_entries, pattern_mask):
        with pytest.raises(ValueError, match=rf"offset: {offset} .*must be 0 to stride - 1 = 3"):
            call("strided", 8, 4, offset=offset)
