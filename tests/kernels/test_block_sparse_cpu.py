"""The block-sparse kernels for CPUs against float64 products, and how their library is built and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Process
from torch.utils._python_dispatch import TorchDispatchMode

from megasparse.kernels.block_sparse import apply_mask_, build_index, cpu, dense, reference, sparse_linear
from megasparse.kernels.common.build import load_library

ROOT = Path(__file__).resolve().parents[2]
needs_kernels = pytest.mark.skipif(
    cpu.why_not("cpu", torch.float32, 64) is not None, reason=f"{cpu.why_not('cpu', torch.float32, 64)}"
)


def case(rows: int, columns: int, block: int, tokens: int, density: float, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < density
    weight = apply_mask_(torch.randn(rows * block, columns * block, generator=generator), mask, block).to(dtype)
    x, dy = (torch.randn(tokens, width * block, generator=generator).to(dtype) for width in (columns, rows))
    bias = torch.randn(rows * block, generator=generator).to(dtype)
    return x, dy, weight, bias, build_index(mask, block)


def compare(got: torch.Tensor | None, expected: torch.Tensor | None, terms: int, dtype: torch.dtype) -> None:
    """Sums of `terms` products of order 1, in float32: each of the additions errs by 2^-24 of a partial sum, which
    grows like sqrt(terms). A bfloat16 result is rounded once more, by 2^-9 of itself.
    """
    atol = 2**-24 * max(terms, 1) * 8
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), expected.double(), rtol=rtol, atol=atol)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    block=st.sampled_from([16, 32, 64, 128]),
    tokens=st.sampled_from([1, 2, 5, 13, 127, 129, 300]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_products_match_the_reference(rows, columns, block, tokens, density, dtype, seed) -> None:
    x, dy, weight, bias, index = case(rows, columns, block, tokens, density, dtype, seed)
    wide = [tensor.double() for tensor in (x, dy, weight, bias)]
    y = cpu.forward(x, weight, bias, index)
    compare(y, reference.forward(wide[0], wide[2], wide[3], index), columns * block, dtype)
    everything = (True, True, True)
    got = cpu.backward(dy, x, weight, index, everything)
    expected = reference.backward(wide[1], wide[0], wide[2], index, everything)
    for gradient, wanted, terms in zip(got, expected, (rows * block, tokens, tokens), strict=True):
        assert gradient.dtype == dtype
        compare(gradient, wanted, terms, dtype)
    inactive = ~index.mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert (got[1][inactive] == 0).all()
    # A part that is not asked for changes nothing in the others.
    only = cpu.backward(dy, x, weight, index, (False, True, False))
    assert only[0] is None and only[2] is None and torch.equal(only[1], got[1])


@needs_kernels
@pytest.mark.parametrize("layout", ["MEGASPARSE_PAIRS", "MEGASPARSE_TILES"])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 18, 301, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (6, 131))])
def test_pairs_and_tiles_of_bfloat16_give_the_same(monkeypatch, layout, block, tokens) -> None:
    """The layouts of AVX-512-BF16 and AMX, with their instructions spelt out where the processor has none."""
    monkeypatch.setattr(cpu, "_library", lambda: cpu.declare(load_library(cpu.SOURCE, layout)))
    x, dy, weight, bias, index = case(3, 5, block, tokens, 0.5, torch.bfloat16)
    wide = [tensor.double() for tensor in (x, dy, weight, bias)]
    y = cpu.forward(x, weight, bias, index)
    compare(y, reference.forward(wide[0], wide[2], wide[3], index), 5 * block, torch.bfloat16)
    got = cpu.backward(dy, x, weight, index, (True, True, True))
    expected = reference.backward(wide[1], wide[0], wide[2], index, (True, True, True))
    for gradient, wanted, terms in zip(got, expected, (3 * block, tokens, tokens), strict=True):
        compare(gradient, wanted, terms, torch.bfloat16)


@needs_kernels
def test_autograd_agrees_with_the_dense_kernel() -> None:
    x, dy, weight, bias, index = case(4, 6, 32, 50, 0.4, torch.float32)
    for dense_gradient in (False, True):
        results = []
        for kernel in ("cpu", "dense"):
            leaves = [tensor.clone().requires_grad_() for tensor in (x.view(2, 25, -1), weight, bias)]
            y = sparse_linear(*leaves, index, dense_gradient, kernel)
            y.backward(dy.view(2, 25, -1))
            results.append([y, *(leaf.grad for leaf in leaves)])
        for ours, dense_one in zip(*results, strict=True):
            compare(ours, dense_one, 192, torch.float32)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_do_not_depend_on_the_number_of_threads(dtype) -> None:
    x, dy, weight, bias, index = case(5, 7, 64, 333, 0.3, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = cpu.forward(x, weight, bias, index)
            results.append((y, *cpu.backward(dy, x, weight, index, (True, True, True))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_and_misaligned_inputs(dtype) -> None:
    x, dy, weight, bias, index = case(3, 4, 16, 9, 0.5, dtype)
    expected = cpu.forward(x, weight, bias, index)
    wide = torch.zeros(9, 3 * x.shape[1] + 1, dtype=dtype)
    for view in (wide[:, 1 : 1 + x.shape[1]], wide[:, 2 : 2 + x.shape[1]], torch.zeros(x.shape[::-1], dtype=dtype).t()):
        view.copy_(x)
        assert torch.equal(cpu.forward(view, weight, bias, index), expected)
        got = cpu.backward(dy, view, weight, index, (True, True, True))
        assert torch.equal(got[1], cpu.backward(dy, x, weight, index, (True, True, True))[1])


@needs_kernels
def test_infinities_and_nans_are_kept_in_bfloat16() -> None:
    x, _, weight, bias, index = case(2, 2, 16, 4, 1.0, torch.bfloat16)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    y = cpu.forward(x, weight.abs(), bias, index)
    assert y[0].isnan().all() and y[1].isinf().all() and y[2:].isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operator made, but for those of the shapes named."""

    def __init__(self, *shapes: torch.Size) -> None:
        super().__init__()
        self.shapes, self.bytes = shapes, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.shape not in self.shapes:
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temporaries_are_proportional_to_the_active_blocks(dtype) -> None:
    x, dy, weight, bias, index = case(16, 16, 64, 512, 0.1, dtype)
    with LargestTensor(x.shape, dy.shape, weight.shape) as largest:
        cpu.forward(x, weight, bias, index)
        cpu.backward(dy, x, weight, index, (True, True, True))
    # Active weights in float32, and padded tiles: 128 tokens of x and dy, or 192 KiB for each thread.
    tiles = max(128 * (x.shape[1] + dy.shape[1]) * 80 // 64 + dy.shape[1], 48 * 1024 * torch.get_num_threads())
    assert 0 < largest.bytes <= 4 * (index.num_active * 64**2 + tiles)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return processes.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


USE = """
import torch
from megasparse.kernels.block_sparse import build_index, sparse_linear
index = build_index(torch.eye(2, dtype=torch.bool), 16)
x = torch.randn(3, 32)
for _ in range(2):
    print(tuple(sparse_linear(x, torch.zeros(32, 32), None, index, kernel={kernel!r}).shape))
"""


def test_without_a_compiler_dense_products_run_and_a_forced_kernel_is_refused(tmp_path) -> None:
    broken = {"CXX": "/bin/false", "MEGASPARSE_CACHE": str(tmp_path)}
    done = python(USE.format(kernel="auto"), **broken)
    assert done.returncode == 0 and done.stdout.count("(3, 32)") == 2, done.stderr
    assert not list(tmp_path.glob("*.so"))
    for compiler, reason in (("/bin/false", "exit status 1"), ("no-such-compiler", "no C++ compiler found")):
        done = python(USE.format(kernel="cpu"), **{**broken, "CXX": compiler})
        assert done.returncode != 0
        assert "ValueError" in done.stderr and "'cpu' cannot run" in done.stderr and reason in done.stderr
        assert "here it must be auto, dense, reference" in done.stderr


@needs_kernels
def test_one_of_several_processes_compiles(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MEGASPARSE_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", USE.format(kernel="cpu")]
    with ExitStack() as stack:
        runs = [
            stack.enter_context(Process(command, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            for _ in range(3)
        ]
        outputs = [run.communicate(timeout=processes.LIMIT_SECONDS) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert sum("compiling" in errors for _, errors in outputs) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1


@needs_kernels
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    done = python(USE.format(kernel="cpu"), MEGASPARSE_CACHE=str(occupied))
    assert done.returncode != 0 and str(occupied) in done.stderr


def test_supported_inputs() -> None:
    assert "not on cuda" in cpu.why_not("cuda", torch.float32, 64)
    assert "torch.float16" in cpu.why_not("cpu", torch.float16, 64)
    assert "sparsity.block_size 8" in cpu.why_not("cpu", torch.float32, 8)


def test_dense_and_reference_agree() -> None:
    x, dy, weight, bias, index = case(3, 4, 8, 20, 0.4, torch.float32)
    compare(dense.forward(x, weight, bias, index), reference.forward(x, weight, bias, index), 32, torch.float32)
    everything = (True, True, True)
    pairs = zip(*(k.backward(dy, x, weight, index, everything) for k in (dense, reference)), strict=True)
    for one, two in pairs:
        compare(one, two, 32, torch.float32)
