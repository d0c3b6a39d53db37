"""The kernel "tiled" of hybrid_attention against the reference, its tiles against the patterns, and its memory."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megasparse.kernels.hybrid_attention import (
    PATTERNS,
    active_entries,
    executed_entries,
    hybrid_attention,
    operators,
    pattern_mask,
    select_kernel,
)
from megasparse.kernels.hybrid_attention import layout as layout_module
from megasparse.kernels.hybrid_attention.tiles import View, overhang, pattern_tiles

STRIDES = (1, 4, 16)
WITH_OFFSET = [name for name, pattern in PATTERNS.items() if pattern.has_offset]


def lengths(stride: int) -> list[int]:
    return sorted({1, max(stride - 1, 1), stride, stride + 1, 3 * stride + 5, 130})


def inputs(num_heads: int, num_groups: int, seq_length: int, dtype=torch.float64, head_dim: int = 5):
    """Tensors that require gradients, with the strides that the attention layer makes."""
    heads = (num_heads, num_groups, num_groups)
    tensors = [torch.randn(2, seq_length, count, head_dim, dtype=dtype).transpose(1, 2) for count in heads]
    return [tensor.requires_grad_() for tensor in tensors]


def documents_of(seq_length: int, kind: str) -> torch.Tensor | None:
    """[2, seq_length]; the two samples differ."""
    if kind == "none":
        return None
    if kind == "one":
        return torch.full((2, seq_length), 7)
    if kind == "single tokens":
        return torch.arange(seq_length).repeat(2, 1)
    return (torch.rand(2, seq_length) < 0.2).long().cumsum(-1)


def check_equal(q, k, v, patterns, stride, *, documents=None, offsets=0, tolerance=1e-10) -> None:
    """Outputs and all gradients of both kernels; NaN in any of them fails."""
    outputs = [
        hybrid_attention(q, k, v, patterns, stride, kernel, documents, offsets=offsets)
        for kernel in ("tiled", "reference")
    ]
    dy = torch.randn_like(outputs[0])
    mine, expected = ((y, *torch.autograd.grad(y, (q, k, v), dy)) for y in outputs)
    for name, got, wanted in zip(("y", "dq", "dk", "dv"), mine, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_reference(pattern: str, stride: int) -> None:
    for seq_length in lengths(stride):
        # float64 on both sides: sums of at most 130 terms of order 1.
        check_equal(*inputs(4, 2, seq_length), pattern, stride)


@pytest.mark.parametrize("stride", [4, 16, 50, 200])
@pytest.mark.parametrize("pattern", WITH_OFFSET)
def test_offsets(pattern: str, stride: int) -> None:
    for offset, seq_length in product((1, stride // 2, stride - 1), (1, stride - 1, stride + 1, 130)):
        check_equal(*inputs(2, 1, seq_length), pattern, stride, offsets=offset)
    check_equal(*inputs(2, 1, 130), pattern, stride, offsets=stride - 1, documents=documents_of(130, "random"))


def test_heads_with_offsets_and_patterns_of_their_own() -> None:
    patterns = ("full", "sparse", "local", "fixed", "sparse", "strided")
    options = {"offsets": (0, 3, 2, 7, 5, 5), "documents": documents_of(75, "random")}
    check_equal(*inputs(6, 3, 75), patterns, 8, **options)
    q, k, v = inputs(6, 3, 75)
    together = hybrid_attention(q, k, v, patterns, 8, "tiled", offsets=options["offsets"])
    for head, (pattern, offset) in enumerate(zip(patterns, options["offsets"], strict=True)):
        keys = slice(head // 2, head // 2 + 1)
        alone = hybrid_attention(q[:, head : head + 1], k[:, keys], v[:, keys], pattern, 8, "tiled", offsets=offset)
        torch.testing.assert_close(together[:, head : head + 1], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["one", "random", "single tokens"])
def test_documents(pattern: str, kind: str) -> None:
    for stride, seq_length in ((1, 9), (4, 37), (16, 70), (70, 131)):
        documents = documents_of(seq_length, kind)
        check_equal(*inputs(4, 2, seq_length), pattern, stride, documents=documents)


@pytest.mark.parametrize("kernel", ["tiled", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_query_sees_another_document(kernel: str, pattern: str) -> None:
    q, k, v = inputs(2, 2, 40)
    documents = torch.tensor([0] * 13 + [3] * 17 + [4] * 10).repeat(2, 1)
    y = hybrid_attention(q, k, v, pattern, 4, kernel, documents_BT=documents)
    for gradient in torch.autograd.grad(y[:, :, 13:30].sum(), (k, v)):
        assert gradient[:, :, :13].abs().max() == 0
        assert gradient[:, :, 30:].abs().max() == 0
        assert gradient[:, :, 13:30].abs().max() > 0


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
@pytest.mark.parametrize("limit", [1, 5_000, 2**26])
def test_grouped_heads_in_groups_of_any_size(groups: int, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(layout_module, "CPU_SCORES", limit)
    for pattern in ("sparse", "fixed"):
        check_equal(*inputs(6, groups, 150), pattern, 16, documents=documents_of(150, "random"))


def test_mixed_patterns() -> None:
    patterns = ("full", "sparse", "local", "fixed", "sparse", "strided")
    check_equal(*inputs(6, 3, 75), patterns, 8, documents=documents_of(75, "random"))
    check_equal(*inputs(6, 3, 75), patterns, 8)


def test_long_strides_and_windows_of_several_tiles() -> None:
    for pattern, stride in product(PATTERNS, (97, 128, 1000)):
        check_equal(*inputs(1, 1, 411), pattern, stride)


@pytest.mark.parametrize(
    ("kernel", "offset"),
    [
        ("tiled", 2),
        *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in (("tiled", 0), ("reference", 0))),
        ("reference", 2),
    ],
)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradcheck(pattern: str, kernel: str, offset: int) -> None:
    q, k, v = inputs(2, 1, 11, head_dim=3)
    documents = torch.tensor([[0] * 5 + [1] * 6, [0] * 11])
    assert torch.autograd.gradcheck(
        lambda q, k, v: hybrid_attention(q, k, v, pattern, 3, kernel, documents, offsets=offset), (q, k, v)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = inputs(4, 2, 150, dtype, head_dim=16)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    for pattern in PATTERNS:
        y, expected = hybrid_attention(q, k, v, pattern, 16, "tiled"), hybrid_attention(*wide, pattern, 16, "reference")
        assert y.dtype == dtype
        dy = torch.randn_like(y)
        got, wanted = torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(expected, wide, dy.double())
        # Inputs are exact and sums are float32: what is left is the rounding of the result, and of y in sum(dy y),
        # a sum of 16 terms of order 1.
        for mine, reference in zip((y, *got), (expected, *wanted), strict=True):
            assert mine.dtype == dtype
            assert (mine.double() - reference).abs().max() < 32 * torch.finfo(dtype).eps * reference.abs().max()


def test_scores_of_any_size_stay_finite() -> None:
    q, k, v = inputs(2, 2, 70, torch.float32)
    for pattern, factor in product(PATTERNS, (1e3, -1e3)):
        y = hybrid_attention(q * factor, k * 30, v, pattern, 16, "tiled")
        gradients = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@pytest.mark.parametrize(("pattern", "seq_length", "stride"), [*product(PATTERNS, (1, 50, 150, 300), (1, 7, 16, 128))])
def test_tiles_hold_every_active_pair_once(pattern: str, seq_length: int, stride: int) -> None:
    for offset in {0, stride // 2, stride - 1} if pattern in WITH_OFFSET else {0}:
        check_tiles(pattern, seq_length, stride, offset)


def check_tiles(pattern: str, seq_length: int, stride: int, offset: int) -> None:
    tiles = pattern_tiles(pattern, seq_length, stride, offset)
    front, end = overhang(tiles)
    tokens = torch.arange(-front, end).view(1, -1, 1)
    count = torch.zeros(seq_length, seq_length, dtype=torch.int64)
    for part in tiles:
        for piece in part.slices(10_000):
            views: tuple[View, View] = (piece.queries, piece.keys)
            queries, keys = (view.of(tokens, front, piece.num_tiles).reshape(piece.num_tiles, -1) for view in views)
            active = torch.zeros(piece.num_tiles, queries.shape[1], keys.shape[1])
            for of_tiles, mask in piece.masks(torch.float32, torch.device("cpu")):
                active[of_tiles] += mask
            query, key = queries[:, :, None].expand(active.shape), keys[:, None, :].expand(active.shape)
            assert not (active.isfinite() & (key < 0) & (query >= 0)).any()
            chosen = active.isfinite() & (query >= 0) & (query < seq_length) & (key < seq_length)
            count.index_put_((query[chosen], key[chosen]), torch.ones(int(chosen.sum()), dtype=torch.int64), True)
    assert torch.equal(count, pattern_mask(pattern, seq_length, stride, offset=offset).long())


def test_executed_entries_are_those_of_the_tiles() -> None:
    # 32 tiles of 32 queries against the 128 keys before them and their own; 128 sequences of 8 tokens.
    window, residues = 32 * 32 * (128 + 32), 128 * 8 * 8
    assert executed_entries("tiled", "local", 1024, 128) == window
    assert executed_entries("tiled", "strided", 1024, 128) == residues
    assert executed_entries("tiled", "sparse", 1024, 128) == window + residues
    # Blocks in four tiles, of 32 to 128 keys; then the 7 last tokens, for the queries of all blocks but the first.
    assert executed_entries("tiled", "fixed", 1024, 128) == 8 * 32 * (32 + 64 + 96 + 128) + 7 * 128 * 7
    # Half of the square, in rows of 32.
    assert executed_entries("tiled", "full", 1024, 128) == sum(32 * 32 * (row + 1) for row in range(32))
    for pattern, seq_length in product(PATTERNS, (1, 100, 4096)):
        for offset in (0, 100):
            active = active_entries(pattern, seq_length, 128, offset)
            assert executed_entries("tiled", pattern, seq_length, 128, offset=offset) >= active
    # A token with itself in tiles of 16; 128 sequences of 8 tokens, whose queries are moved on.
    assert executed_entries("tiled", "strided", 1024, 128, offset=100) == 1024 * 16 + 128 * 8 * 8


class Counter(TorchDispatchMode):
    """Scores that are multiplied out, and the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        if func is torch.ops.aten.bmm.out:
            self.scores += result.numel() * args[0].shape[-1]
        return result


@pytest.mark.parametrize("pattern", PATTERNS)
def test_work_is_what_is_counted_and_memory_is_linear(pattern: str, monkeypatch) -> None:
    monkeypatch.setattr(layout_module, "CPU_SCORES", 2**15)  # else the scores in work hide what depends on T
    # Operators of ours are opaque to the counter; the functions in them are not.
    for name in ("attention_forward", "attention_backward"):
        monkeypatch.setattr(operators, name, getattr(operators, name)._init_fn)
    D = 4
    largest = []
    for seq_length in (2048, 4096):
        q, k, v = inputs(1, 1, seq_length, torch.float32, head_dim=D)
        with Counter() as counter:
            y = hybrid_attention(q, k, v, pattern, 64, "tiled")
            assert counter.scores == 2 * 2 * D * executed_entries("tiled", pattern, seq_length, 64)
            y.sum().backward()
        assert counter.scores == 2 * 7 * D * executed_entries("tiled", pattern, seq_length, 64)
        largest.append(counter.largest)
    assert largest[1] < 4096 * 4096 // 32
    assert largest[1] <= 2.1 * largest[0]


@pytest.mark.parametrize("kernel", ["tiled", "reference"])
def test_recomputation_gives_the_same_gradients(kernel: str) -> None:
    q, k, v = inputs(4, 2, 90, torch.float32)

    def attend(*tensors):
        patterns = ("sparse", "strided", "fixed", "local")
        return hybrid_attention(*tensors, patterns, 16, kernel, offsets=(0, 3, 9, 15))

    plain = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    again = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_inference_mode_leaves_nothing_behind() -> None:
    q, k, v = inputs(2, 2, 47, torch.float32)
    with torch.inference_mode():
        first = hybrid_attention(q, k, v, "sparse", 6, "tiled")
    second = hybrid_attention(q, k, v, "sparse", 6, "tiled")
    second.sum().backward()
    assert torch.equal(first, second)
    assert q.grad is not None and not math.isnan(q.grad.sum().item())


@pytest.mark.usefixtures("unmeasured")
def test_auto_takes_parts_where_they_are_faster() -> None:
    q, k, v = inputs(1, 1, 1024)
    for pattern in PATTERNS:
        chosen = select_kernel(
            "auto", pattern, 1024, 64, dtype=torch.float64
        )  # which the compiled kernel does not have
        assert chosen == ("causal" if pattern == "full" else "tiled")
        expected = hybrid_attention(q, k, v, pattern, 64, chosen)
        assert torch.equal(hybrid_attention(q, k, v, pattern, 64), expected)
        assert select_kernel("auto", pattern, 16, 64) == ("causal" if pattern == "full" else "reference")
        assert select_kernel("reference", pattern, 4096, 64) == "reference"


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), r"shape \[2, 6\].*of shape \[2, 7\]"),
        (torch.zeros(2, 7), "float32.*int32 or int64"),
    ],
)
def test_mistakes_in_documents_are_named(documents: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hybrid_attention(*inputs(2, 2, 7), "sparse", 4, documents_BT=documents)
