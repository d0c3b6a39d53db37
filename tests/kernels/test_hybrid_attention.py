"""hybrid_attention against a naive float64 softmax, forward and backward, with grouped and mixed heads."""

from __future__ import annotations

import math

import pytest
import torch

from megasparse.kernels.hybrid_attention import PATTERNS, executed_entries, hybrid_attention, pattern_mask
from megasparse.kernels.hybrid_attention.reference import cached_mask

# Sorting these heads by pattern is no involution, so that a way back in the wrong direction shows.
MIXED = ("full", "sparse", "local", "fixed", "sparse", "strided")


def naive(q, k, v, patterns, stride):
    """Head by head, with explicit scores."""
    D, T = q.shape[-1], q.shape[2]
    share = q.shape[1] // k.shape[1]
    outputs = []
    for head, pattern in enumerate(patterns):
        scores = torch.einsum("bqd,bkd->bqk", q[:, head], k[:, head // share])
        scores = scores / math.sqrt(D)
        scores = scores.masked_fill(~pattern_mask(pattern, T, stride), -math.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        outputs.append(torch.einsum("bqk,bkd->bqd", weights, v[:, head // share]))
    return torch.stack(outputs, dim=1)


def inputs(num_heads, num_groups, seq_length, dtype):
    shape = {"q": num_heads, "k": num_groups, "v": num_groups}
    return [torch.randn(2, heads, seq_length, 8, dtype=dtype, requires_grad=True) for heads in shape.values()]


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
@pytest.mark.parametrize("patterns", [*PATTERNS, MIXED], ids=str)
def test_matches_naive_softmax(patterns, groups) -> None:
    q, k, v = inputs(6, groups, 29, torch.float64)
    names = (patterns,) * 6 if isinstance(patterns, str) else patterns
    expected = naive(q, k, v, names, 5)
    got = hybrid_attention(q, k, v, patterns, 5)
    # float64 on both sides: sums of at most 29 terms of order 1.
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(expected)
    for mine, reference in zip(
        torch.autograd.grad(got, (q, k, v), dy), torch.autograd.grad(expected, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype) -> None:
    q, k, v = inputs(6, 3, 33, dtype)
    expected = naive(q.double(), k.double(), v.double(), MIXED, 8)
    got = hybrid_attention(q, k, v, MIXED, 8)
    assert got.dtype == dtype
    # Outputs are averages of |v| <= 4 or so. Rounding of probabilities and of the output, and of scores of size <= 4
    # before the exponential: a few units in the last place each.
    bound = 16 * torch.finfo(dtype).eps
    assert (got.double() - expected).abs().max() < bound * 4


def test_no_query_sees_the_future() -> None:
    q, k, v = inputs(6, 6, 20, torch.float64)
    for position in (0, 7, 18):
        out = hybrid_attention(q, k, v, MIXED, 4)[:, :, position].sum()
        for gradient in torch.autograd.grad(out, (k, v)):
            assert gradient[:, :, position + 1 :].abs().max() == 0


def test_masks_are_built_once_and_survive_inference_mode() -> None:
    q, k, v = inputs(2, 2, 41, torch.float32)
    with torch.inference_mode():
        hybrid_attention(q, k, v, "sparse", 6)
    misses = cached_mask.cache_info().misses
    hybrid_attention(q, k, v, "sparse", 6).sum().backward()
    assert cached_mask.cache_info().misses == misses
    assert not cached_mask("sparse", 41, 6, q.device).is_inference()
    assert q.grad is not None


def test_mistakes_are_named() -> None:
    q, k, v = inputs(4, 2, 5, torch.float32)
    with pytest.raises(ValueError, match="'tritn'.*auto, reference"):
        hybrid_attention(q, k, v, "full", 4, kernel="tritn")
    with pytest.raises(ValueError, match="'tritn'.*auto, reference"):
        executed_entries("tritn", "full", 8, 4)
    with pytest.raises(ValueError, match="'lokal'"):
        hybrid_attention(q, k, v, ("full", "full", "lokal", "full"), 4)
    with pytest.raises(ValueError, match="got 3 for 4 query heads"):
        hybrid_attention(q, k, v, ("full",) * 3, 4)
    with pytest.raises(ValueError, match="2 does not divide the 3"):
        hybrid_attention(q[:, :3], k, v, "full", 4)
