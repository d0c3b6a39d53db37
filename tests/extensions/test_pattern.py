"""A sixth attention pattern, added from outside the package with a reference only, works under `auto`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megasparse.kernels.hybrid_attention import (
    active_entries,
    attend_cached,
    executed_entries,
    hybrid_attention,
    pattern_mask,
    select_kernel,
    widened,
)
from megasparse.kernels.hybrid_attention.patterns import PATTERNS, Pattern

LENGTH, STRIDE = 1024, 16
SINK = "sink"


def sees_sink(query: Tensor, key: Tensor, stride: int, offset: int) -> Tensor:
    """The first `stride` tokens and the query itself."""
    return (key < stride) | (query == key)


@pytest.fixture(autouse=True)
def sink(monkeypatch) -> None:
    pattern = Pattern(
        sees=sees_sink,
        entries=lambda seq_length, stride, offset: sum(min(q, stride) + 1 for q in range(seq_length)),
        visible_keys=lambda position, stride, offset: (
            (range(min(position, stride)), range(position, position + 1)) if position else (range(1),)
        ),
        has_offset=False,
    )
    monkeypatch.setitem(PATTERNS, SINK, pattern)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor]) -> Tensor:
    """In float64, with a mask for each head and a key-value head for each two of them."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.stack(masks), -torch.inf).softmax(-1) @ v


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, LENGTH, 8).to(dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("patterns", [SINK, (SINK, "sparse", SINK, "full")], ids=["alone", "mixed"])
def test_values_and_gradients_are_those_of_plain_attention(patterns, dtype) -> None:
    leaves = inputs(dtype)
    names = (patterns,) * 4 if isinstance(patterns, str) else patterns
    got = hybrid_attention(*leaves, patterns, STRIDE, offsets=(0, 3, 5, 0))
    position = torch.arange(LENGTH)
    query, key = position[:, None], position
    sink = (key <= query) & ((key < STRIDE) | (key == query))
    masks = [
        sink if name == SINK else pattern_mask(name, LENGTH, STRIDE, offset=offset)
        for name, offset in zip(names, (0, 3, 5, 0), strict=True)
    ]
    expected = plain_attention(*leaves, masks)
    dy = torch.randn_like(got)
    gradients = torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, leaves, dy.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for mine, wanted in zip((got, *gradients[0]), (expected, *gradients[1]), strict=True):
        torch.testing.assert_close(mine.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_kernel_but_the_reference_is_taken(device) -> None:
    shape = LENGTH, STRIDE, device
    assert select_kernel("auto", SINK, *shape, planned=True) == "reference"
    assert executed_entries("auto", SINK, *shape, planned=True) == LENGTH**2
    assert widened("auto", (SINK, "full"), *shape) == (SINK, "full")
    for kernel in ("causal", "tiled", "cpu", "triton"):
        with pytest.raises(
            ValueError, match=rf"'{kernel}' does not compute the pattern 'sink'.*must be auto, reference$"
        ):
            select_kernel(kernel, SINK, *shape, planned=True)


def test_the_work_that_it_asks_for_is_counted() -> None:
    assert active_entries(SINK, LENGTH, STRIDE) == int(pattern_mask(SINK, LENGTH, STRIDE).sum())


def test_generation_gives_what_training_gives() -> None:
    q, k, v = (x.detach() for x in inputs())
    patterns = SINK, "sparse", SINK, "full"
    expected = hybrid_attention(q, k, v, patterns, STRIDE)
    first = LENGTH - 3
    got = attend_cached(q[:, :, first:], k, v, patterns, STRIDE, first, offsets=(1, 0, 2, 3))
    torch.testing.assert_close(got, expected[:, :, first:], rtol=1e-4, atol=1e-5)
