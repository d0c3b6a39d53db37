"""The compiled kernel "cpu" of hybrid_attention against a float64 softmax under a boolean mask, and its operators."""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import product
from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megasparse.kernels.common.build import load_library
from megasparse.kernels.hybrid_attention import (
    PATTERNS,
    active_entries,
    break_even,
    cpu,
    executed_entries,
    hybrid_attention,
    operators,
    select_kernel,
)

ROOT = Path(__file__).resolve().parents[2]
reason = cpu.why_not("cpu", torch.float32)
needs_kernel = pytest.mark.skipif(reason is not None, reason=f"{reason}")
attend_cpu = partial(hybrid_attention, kernel="cpu")


def inputs(num_heads: int, num_groups: int, seq_length: int, dtype=torch.float32, head_dim: int = 5, samples: int = 2):
    """Tensors that require gradients, with the strides that the attention layer makes."""
    heads = (num_heads, num_groups, num_groups)
    tensors = [torch.randn(samples, seq_length, count, head_dim).to(dtype).transpose(1, 2) for count in heads]
    return [tensor.requires_grad_() for tensor in tensors]


def documents_of(seq_length: int) -> Tensor:
    return (torch.rand(2, seq_length) < 0.1).long().cumsum(-1)


def offset_mask(pattern: str, seq_length: int, stride: int, offset: int) -> Tensor:
    """The definition of the patterns with an offset, [T, T]."""
    position = torch.arange(seq_length)
    q, k = position[:, None], position[None, :]
    strided = ((q - k) % stride == offset) | (q == k)
    same_block = (q + offset) // stride == (k + offset) // stride
    sees = {
        "full": q >= k,
        "local": q - k < stride,
        "strided": strided,
        "sparse": (q - k < stride) | strided,
        "fixed": same_block | ((k + offset) % stride == stride - 1),
    }
    return sees[pattern] & (q >= k)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v


def check(q, k, v, patterns, stride, *, offsets=0, documents=None) -> None:
    """Outputs and all gradients; NaN in any of them fails."""
    y = attend_cpu(q, k, v, patterns, stride, documents_BT=documents, offsets=offsets)
    (_, num_heads, seq_length, _), dtype = q.shape, q.dtype
    names = [patterns] * num_heads if isinstance(patterns, str) else patterns
    shifts = [offsets] * num_heads if isinstance(offsets, int) else offsets
    masks = [offset_mask(name, seq_length, stride, shift) for name, shift in zip(names, shifts, strict=True)]
    mask = torch.stack(masks)[None]
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = softmax_attention(*wide, mask)
    dy = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, (q, k, v), dy))
    wanted = (expected, *torch.autograd.grad(expected, wide, dy.double()))
    # Inputs are exact and sums are float32: what is left is the rounding of sums of up to 130 terms of order 1, of the
    # result, and of y in sum(dy y), whose error is as large where gradients cancel.
    for name, mine, reference in zip(("y", "dq", "dk", "dv"), got, wanted, strict=True):
        assert mine.dtype == dtype
        error, size = (mine.double() - reference).abs().max(), reference.abs().max().clamp(min=1)
        assert error < 32 * torch.finfo(dtype).eps * size, (name, error, size)


@needs_kernel
@pytest.mark.parametrize("stride", [1, 4, 16, 33])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_softmax(pattern: str, stride: int) -> None:
    for seq_length in sorted({1, max(stride - 1, 1), stride, stride + 1, 3 * stride + 5, 130}):
        check(*inputs(4, 2, seq_length), pattern, stride)


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_strides_and_rows_in_several_pieces(pattern: str) -> None:
    for stride, seq_length in ((97, 411), (128, 300), (250, 470), (1000, 60)):
        check(*inputs(1, 1, seq_length, head_dim=16, samples=1), pattern, stride)


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_documents(pattern: str) -> None:
    for stride, seq_length in ((1, 9), (4, 37), (16, 250), (70, 131)):
        for documents in (documents_of(seq_length), torch.full((2, seq_length), 7), torch.arange(seq_length)):
            given = documents.expand(2, seq_length).to(torch.int32 if stride == 4 else torch.int64)
            check(*inputs(4, 2, seq_length), pattern, stride, documents=given)


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_offsets_of_the_stride(pattern: str) -> None:
    for stride, seq_length in ((1, 9), (4, 37), (16, 130), (70, 131), (90, 40)):
        for offset in {stride // 2, stride - 1}:
            check(*inputs(2, 2, seq_length), pattern, stride, offsets=offset)
        check(*inputs(3, 1, seq_length), pattern, stride, offsets=[0, 1 % stride, stride - 1])
    check(*inputs(2, 2, 75), pattern, 8, offsets=[3, 7], documents=documents_of(75))


@needs_kernel
def test_the_layout_of_wide_vectors_gives_the_same(monkeypatch) -> None:
    """That of AVX-512, with the vectors that this processor has."""
    library = cpu.declare(load_library(cpu.SOURCE, "MEGASPARSE_WIDE"))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    for pattern in PATTERNS:
        for seq_length, stride, head_dim in ((1, 1, 5), (50, 4, 24), (300, 128, 16), (130, 7, 33)):
            check(*inputs(2, 1, seq_length, head_dim=head_dim), pattern, stride, documents=documents_of(seq_length))


@needs_kernel
@pytest.mark.parametrize("groups", [6, 3, 2, 1])
def test_grouped_heads_and_mixed_patterns(groups: int) -> None:
    patterns = ("full", "sparse", "local", "fixed", "sparse", "strided")
    check(*inputs(6, groups, 75), patterns, 8, documents=documents_of(75), offsets=[0, 1, 2, 3, 4, 5])


@needs_kernel
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("head_dim", [1, 8, 24, 64, 80, 96, 128])
def test_dtypes_and_head_dims(dtype: torch.dtype, head_dim: int) -> None:
    for pattern in ("sparse", "fixed"):
        check(*inputs(2, 1, 150, dtype, head_dim, samples=1), pattern, 16)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_finite_value_is_widened_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    # Tile registers take what is below 2^-126 for 0, and with it the mean of two numbers that nearly cancel.
    smallest = 2.0**-110 if dtype == torch.bfloat16 else 0
    values = torch.where(values.isfinite() & (values.abs() >= smallest), values, 0).view(1, 1, -1, 64)
    same = attend_cpu(torch.zeros_like(values), torch.zeros_like(values), values, "local", 1)
    assert torch.equal(same, values)
    # Two equal weights: the mean of each token and the one before it.
    mixed = values.flatten()[torch.randperm(2**16)].view(1, 1, -1, 64)
    mean = attend_cpu(torch.zeros_like(mixed), torch.zeros_like(mixed), mixed, "local", 2)
    expected = ((mixed[:, :, 1:].float() + mixed[:, :, :-1].float()) * 0.5).to(dtype)
    assert torch.equal(mean[:, :, 1:], expected)


@needs_kernel
def test_mixed_heads_go_through_the_public_function() -> None:
    q, k, v = inputs(6, 3, 75)
    patterns = ("full", "sparse", "local", "fixed", "sparse", "strided")
    documents = documents_of(75)
    results = []
    for kernel in ("cpu", "reference"):
        y = hybrid_attention(q, k, v, patterns, 8, kernel, documents)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


@needs_kernel
def test_scores_of_any_size_stay_finite() -> None:
    q, k, v = inputs(2, 2, 70)
    for pattern, factor in product(PATTERNS, (1e3, -1e3)):
        y = attend_cpu(q * factor, k * 30, v, pattern, 16)
        gradients = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@needs_kernel
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype, bad: float) -> None:
    """Loss scaling relies on it."""
    q, k, v = inputs(1, 1, 70, dtype, samples=1)
    for pattern in PATTERNS:
        broken = q.detach().clone()
        broken[0, 0, 40] = bad
        assert not attend_cpu(broken, k, v, pattern, 16)[0, 0, 40].isfinite().any()
        y = attend_cpu(q, k, v, pattern, 16)
        dy = torch.zeros_like(y)
        dy[0, 0, 40] = bad
        assert not any(gradient.isfinite().all() for gradient in torch.autograd.grad(y, (q, k, v), dy))


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_query_sees_another_document(pattern: str) -> None:
    q, k, v = inputs(2, 2, 40)
    documents = torch.tensor([0] * 13 + [3] * 17 + [4] * 10).repeat(2, 1)
    y = attend_cpu(q, k, v, pattern, 4, documents_BT=documents)
    for gradient in torch.autograd.grad(y[:, :, 13:30].sum(), (k, v)):
        assert gradient[:, :, :13].abs().max() == 0
        assert gradient[:, :, 30:].abs().max() == 0
        assert gradient[:, :, 13:30].abs().max() > 0


@needs_kernel
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    q, k, v = inputs(6, 3, 203, dtype, 20)
    patterns = ("full", "sparse", "local", "fixed", "sparse", "strided")
    dy, results = torch.randn_like(q), []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        y = attend_cpu(q, k, v, patterns, 16, offsets=[0, 3, 0, 2, 0, 5])
        results.append((y, *torch.autograd.grad(y, (q, k, v), dy)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_kernel
def test_inputs_with_gaps_between_rows_and_elements() -> None:
    q, k, v = inputs(2, 2, 50, head_dim=16)
    qkv = torch.stack([x.detach().transpose(1, 2) for x in (q, k, v)], 2).flatten(2)
    views = [x.view(2, 50, 2, 16).transpose(1, 2) for x in qkv.split(32, -1)]
    apart = [torch.stack([x.detach(), x.detach()], -1)[..., 1] for x in (q, k, v)]
    expected = attend_cpu(q, k, v, "sparse", 8)
    dy = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (q, k, v), dy)
    for tensors in (views, apart):
        leaves = [x.requires_grad_() for x in (x.detach() for x in tensors)]
        y = attend_cpu(*leaves, "sparse", 8)
        got = torch.autograd.grad(y, leaves, torch.stack([dy, dy], -1)[..., 0])
        assert torch.equal(y, expected) and all(map(torch.equal, got, wanted))


def brute_force_entries(pattern: str, seq_length: int, stride: int, offset: int) -> int:
    """Register tiles with an active pair, by looking at the masks of the parts."""
    everything = torch.arange(seq_length)
    mask, distance = offset_mask(pattern, seq_length, stride, offset), everything[:, None] - everything
    if pattern in ("strided", "sparse"):
        far = mask & (distance % stride == offset) & (distance >= (stride if pattern == "sparse" else 0))
        residues = [everything[everything % stride == residue] for residue in range(stride)]
        parts = [(far, residues[residue], residues[residue - offset]) for residue in range(stride)]
        parts.append((mask & ~far, everything, everything))
    elif pattern == "fixed":
        block = (everything + offset) // stride
        own = mask & (block[:, None] == block)
        parts = [(own, everything, everything), (mask & ~own, everything, everything[stride - 1 - offset :: stride])]
    else:
        parts = [(mask, everything, everything)]
    total = 0
    for active, queries, keys in parts:
        for tile in queries.split(cpu.TILE) if len(queries) else ():
            groups = -(-len(tile) // cpu.ROWS)
            for group in range(groups):
                rows = tile[group * len(tile) // groups : (group + 1) * len(tile) // groups]
                for columns in keys.split(cpu.COLUMNS):
                    total += len(rows) * cpu.COLUMNS * bool(active[rows][:, columns].any())
    return total


@pytest.mark.parametrize("pattern", PATTERNS)
def test_executed_entries_are_those_of_the_register_tiles(pattern: str) -> None:
    for seq_length, stride, offset in ((1, 4, 0), (100, 7, 0), (100, 7, 5), (130, 16, 1), (200, 64, 0), (50, 60, 40)):
        expected = brute_force_entries(pattern, seq_length, stride, offset)
        assert cpu.executed_entries(pattern, seq_length, stride, offset) == expected, (seq_length, stride, offset)
        assert expected >= offset_mask(pattern, seq_length, stride, offset).sum()
    # Padding of the window and the blocks; residues of 32 tokens are half of a square.
    assert cpu.executed_entries(pattern, 4096, 128) < 1.6 * active_entries(pattern, 4096, 128)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@needs_kernel
@pytest.mark.parametrize("pattern", PATTERNS)
def test_memory_is_linear(pattern: str) -> None:
    largest = []
    for seq_length in (1024, 2048):
        q, k, v = inputs(1, 1, seq_length, head_dim=4, samples=1)
        with LargestTensor() as most:
            attend_cpu(q, k, v, pattern, 64).sum().backward()
        largest.append(most.numel)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 2048 * 2048 // 8


@needs_kernel
def test_recomputation_gives_the_same_gradients() -> None:
    q, k, v = inputs(4, 2, 90)

    def attend(*tensors):
        return hybrid_attention(*tensors, "sparse", 16, "cpu")

    plain = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    again = torch.autograd.grad(checkpoint(attend, q, k, v, use_reentrant=False).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@needs_kernel
def test_operators_keep_the_rules() -> None:
    for groups, documents in ((2, None), (1, documents_of(20))):
        q, k, v = (x.detach() for x in inputs(2, groups, 20))
        settings = [3, 2], 4, [0, 1], "cpu"
        out, lse = operators.attention_forward(q, k, v, documents, *settings)
        torch.library.opcheck(torch.ops.megasparse.attention_forward.default, (q, k, v, documents, *settings))
        arguments = torch.randn_like(out), q, k, v, documents, out, lse, *settings
        torch.library.opcheck(torch.ops.megasparse.attention_backward.default, arguments)


@needs_kernel
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_equals_eager(backend: str) -> None:
    def attend(q, k, v):
        return hybrid_attention(q * 2, k, v, ("sparse", "local"), 4, "cpu").tanh()

    torch._dynamo.reset()
    results = []
    tensors = inputs(2, 1, 20)
    for function in (attend, torch.compile(attend, fullgraph=True, backend=backend)):
        y = function(*tensors)
        results.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_inputs_that_are_not_supported_are_named() -> None:
    assert "not on cuda" in cpu.why_not("cuda", torch.float32)
    q, k, v = inputs(1, 1, 8, torch.float64)
    with pytest.raises(ValueError, match="'cpu' cannot run: dtype torch.float64.*here it must be auto, reference"):
        hybrid_attention(q, k, v, "sparse", 4, "cpu")


@pytest.mark.usefixtures("unmeasured")
@needs_kernel
def test_auto_takes_the_fastest_that_runs() -> None:
    long = 512
    for pattern in PATTERNS:
        expected = "causal" if pattern == "full" else "cpu"
        assert select_kernel("auto", pattern, long, 64) == expected
        assert executed_entries("auto", pattern, long, 64) == executed_entries(expected, pattern, long, 64)
    limit = break_even.mask_limit("cpu", "sparse", 64, "cpu", torch.float32, 64)
    assert select_kernel("auto", "sparse", limit - 1, 64) == "reference"
    assert select_kernel("auto", "sparse", long, 64, dtype=torch.float64) == "tiled"
    assert select_kernel("auto", "sparse", long, 64, "cuda") != "cpu"


WITHOUT_COMPILER = """
import torch
from megasparse.kernels.hybrid_attention import hybrid_attention, select_kernel
x = torch.randn(1, 1, 512, 4)
print(tuple(hybrid_attention(x, x, x, "sparse", 16).shape), select_kernel("auto", "sparse", 512, 16))
hybrid_attention(x, x, x, "sparse", 16, "cpu")
"""


def test_without_a_working_compiler_tiled_runs_and_a_forced_kernel_is_refused(tmp_path) -> None:
    broken = {"CXX": "/bin/false", "MEGASPARSE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = processes.run(command, env={**os.environ, **broken})
    assert done.stdout == "(1, 1, 512, 4) tiled\n", done.stderr
    assert done.returncode != 0
    assert "ValueError: hybrid_attention kernel: 'cpu' cannot run: /bin/false" in done.stderr
    assert "exit status 1" in done.stderr and "here it must be auto, reference, tiled" in done.stderr


def test_a_plan_looks_for_a_compiler_and_builds_nothing(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "build_failure", lambda source: pytest.fail("it builds"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert select_kernel("auto", "sparse", 4096, 64, planned=True) == "tiled"
    with pytest.raises(ValueError, match="'cpu' cannot run: no C.. compiler found: no-such-compiler"):
        select_kernel("cpu", "sparse", 4096, 64, planned=True)
    monkeypatch.setenv("CXX", sys.executable)
    assert select_kernel("auto", "sparse", 4096, 64, planned=True) == "cpu"
