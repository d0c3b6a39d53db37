"""Attention of bfloat16 in tile registers against a float64 softmax, within what the roundings to bfloat16 explain.

Each test runs with the instructions of this processor and with those of AMX spelt out in C++. Without AMX the first is
the kernel for vectors, which keeps the same bounds.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_hybrid_attention_cpu import attend_cpu, documents_of, inputs, needs_kernel, offset_mask
from torch import Tensor

from megasparse.kernels.common.build import load_library
from megasparse.kernels.hybrid_attention import PATTERNS, cpu

pytestmark = needs_kernel
ALL = "MEGASPARSE_ALL_IN_TILES"
"""Also heads that are faster without."""
LAYOUTS = {"native": (ALL,), "spelt out": (ALL, "MEGASPARSE_TILES")}
MIXED = ("full", "sparse", "local", "fixed", "sparse", "strided")


@pytest.fixture(params=LAYOUTS, autouse=True)
def layout(request, monkeypatch) -> str:
    library = cpu.declare(load_library(cpu.SOURCE, *LAYOUTS[request.param]))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    return request.param


def attend_and_gradients(tensors: Sequence[Tensor], dy: Tensor, *arguments, **settings) -> tuple[Tensor, ...]:
    y = attend_cpu(*tensors, *arguments, **settings)
    return y, *torch.autograd.grad(y, tensors, dy)


def softmax_and_bounds(q, k, v, dy, mask) -> list[tuple[Tensor, Tensor]]:
    """Output and gradients of queries, keys and values in float64, each with how far off it may be.

    The weights P, the gradients of the scores dS and the results are rounded to bfloat16, by a unit roundoff u = 2^-8;
    delta = dy . y is made of the rounded y. What float32 adds is less than the hundredth part that is allowed.
    """
    u, scale = 1.01 * 2**-8, q.shape[-1] ** -0.5
    groups, share = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v, dy = (x.detach().double() for x in (q, k, v, dy))
    k, v = (x.repeat_interleave(share, 1) for x in (k, v))
    p = (q @ k.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    y = p @ v
    ds = p * (dy @ v.mT - (dy * y).sum(-1, keepdim=True))
    y_bound = u * (p @ v.abs() + y.abs())
    ds_bound = u * ds.abs() + (1 + u) * p * (dy.abs() * y_bound).sum(-1, keepdim=True)

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, share)).sum(2)

    dq, dk, dv = ds @ k * scale, shared(ds.mT @ q) * scale, shared(p.mT @ dy)
    return [
        (y, y_bound),
        (dq, ds_bound @ k.abs() * scale + u * dq.abs()),
        (dk, shared(ds_bound.mT @ q.abs()) * scale + u * dk.abs()),
        (dv, u * (shared(p.mT @ dy.abs()) + dv.abs())),
    ]


def check(seq_length, head_dim, heads, groups, patterns, stride, offsets, documents=None) -> None:
    tensors = inputs(heads, groups, seq_length, torch.bfloat16, head_dim)
    dy = torch.randn(2, heads, seq_length, head_dim).bfloat16()
    got = attend_and_gradients(tensors, dy, patterns, stride, documents_BT=documents, offsets=offsets)
    names = [patterns] * heads if isinstance(patterns, str) else patterns
    each = zip(names, offsets, strict=True)
    mask = torch.stack([offset_mask(name, seq_length, stride, offset) for name, offset in each])
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    expected = softmax_and_bounds(*tensors, dy, mask)
    for name, mine, (wanted, bound) in zip(("y", "dq", "dk", "dv"), got, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        excess = ((mine.double() - wanted).abs() / (bound + 1e-6)).max()
        assert excess <= 1, (name, float(excess), seq_length, head_dim, stride)


@pytest.mark.parametrize("seq_length", [1, 17, 100, 257])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_is_as_near_to_the_softmax_as_bfloat16_can_be(pattern: str, seq_length: int) -> None:
    for stride, head_dim in ((1, 32), (4, 80), (16, 64), (33, 128), (128, 64), (300, 5)):
        offsets = [0, 1 % stride, stride // 2, stride - 1]
        check(seq_length, head_dim, 4, 2, pattern, stride, offsets)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_in_several_pieces(pattern: str) -> None:
    check(700, 32, 2, 1, pattern, 128, [0, 5])
    check(600, 64, 1, 1, pattern, 400, [0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_documents(pattern: str) -> None:
    for stride, seq_length in ((1, 9), (4, 37), (16, 250), (70, 331)):
        for documents in (documents_of(seq_length), torch.arange(seq_length)):
            check(seq_length, 64, 2, 2, pattern, stride, [0, stride - 1], documents.expand(2, seq_length))


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_grouped_heads_and_mixed_patterns(groups: int) -> None:
    check(203, 48, 6, groups, MIXED, 8, [0, 1, 0, 3, 4, 5], documents_of(203))


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    tensors, results = inputs(6, 3, 203, torch.bfloat16, 64), []
    dy, before = torch.randn(2, 6, 203, 64).bfloat16(), torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attend_and_gradients(tensors, dy, MIXED, 16, offsets=[0, 3, 0, 2, 0, 5]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_as_far_as_without_tiles(bad: float) -> None:
    """In float32 there are none, and the rows are cut as they are for a head that tiles are not used for."""
    for pattern in PATTERNS:
        for broken in range(4):
            tensors = [x.detach() for x in inputs(1, 1, 150, torch.bfloat16, 64, samples=1)]
            tensors.append(torch.randn_like(tensors[0]))
            tensors[broken][0, 0, 70, 3] = bad
            results = []
            for dtype in (torch.bfloat16, torch.float32):
                *leaves, dy = (x.to(dtype) for x in tensors)
                results.append(attend_and_gradients([x.requires_grad_() for x in leaves], dy, pattern, 16))
            assert not all(x.isfinite().all() for x in results[0])
            for mine, wanted in zip(*results, strict=True):
                assert torch.equal(mine.isfinite(), wanted.isfinite())


def test_a_broken_head_leaves_the_others_as_they_are() -> None:
    tensors, dy = inputs(3, 3, 100, torch.bfloat16, 64), torch.randn(2, 3, 100, 64).bfloat16()
    whole = attend_and_gradients(tensors, dy, "sparse", 16)
    with torch.no_grad():
        tensors[1][0, 1, 40] = float("nan")
    for one, two in zip(whole, attend_and_gradients(tensors, dy, "sparse", 16), strict=True):
        assert torch.equal(one[:, [0, 2]], two[:, [0, 2]]) and torch.equal(one[1], two[1])
        assert not torch.equal(one[0, 1], two[0, 1])


def test_weights_are_rounded_in_tiles_alone(layout: str, monkeypatch) -> None:
    """So the other tests do run what they are for: 63 tokens are too few for tiles, where those were not asked for."""
    if layout == "native":
        pytest.skip("which instructions there are is for the compiler to know")
    tensors, dy = inputs(1, 1, 63, torch.bfloat16, 64), torch.randn(2, 1, 63, 64).bfloat16()
    in_tiles = attend_and_gradients(tensors, dy, "full", 16)
    library = cpu.declare(load_library(cpu.SOURCE))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    others = attend_and_gradients(tensors, dy, "full", 16)
    assert not any(torch.equal(one, two) for one, two in zip(in_tiles, others, strict=True))


def test_inputs_with_gaps_between_rows_and_elements() -> None:
    tensors, dy = inputs(2, 2, 70, torch.bfloat16, 33), torch.randn(2, 2, 70, 33).bfloat16()
    expected = attend_and_gradients(tensors, dy, "sparse", 8)
    apart = [torch.stack([x.detach(), x.detach()], -1)[..., 1].requires_grad_() for x in tensors]
    assert all(map(torch.equal, attend_and_gradients(apart, dy, "sparse", 8), expected))
