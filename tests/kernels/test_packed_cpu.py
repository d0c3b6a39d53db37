"""The C++ kernels on packed storage: against float64 products, and bit for bit what they make of dense storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_weights import leaf, matrix, packed_weight
from torch import Tensor

from megasparse.kernels.block_sparse import BlockIndex, build_index, cpu, pack, packed_linear, reference
from megasparse.kernels.common.build import load_library

pytestmark = pytest.mark.skipif(
    cpu.why_not("cpu", torch.float32, 64) is not None, reason=f"{cpu.why_not('cpu', torch.float32, 64)}"
)

EVERYTHING = (True, True, True)
DTYPES = (torch.float32, torch.bfloat16)


def inputs(index: BlockIndex, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """x, dy and bias."""
    rows, columns = (size * index.block_size for size in index.mask.shape)
    x, dy, bias = (torch.randn(*shape, generator=generator) for shape in ((tokens, columns), (tokens, rows), (rows,)))
    return x.to(dtype), dy.to(dtype), bias.to(dtype)


def compare(got: Tensor, expected: Tensor, terms: int) -> None:
    """Sums of `terms` products of order 1, in float32: each of the additions errs by 2^-24 of a partial sum, which
    grows like sqrt(terms). A bfloat16 result is rounded once more, by 2^-9 of itself.
    """
    rtol = 2**-8 if got.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=2**-24 * max(terms, 1) * 8)


def check(grid: tuple[int, int], block: int, tokens: int, density: float, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, index = packed_weight(grid, block, dtype, density=density, empty=seed % 4, generator=generator)
    x, dy, bias = inputs(index, tokens, dtype, generator)
    dense, unpacked = build_index(index.mask, block), matrix(weight, index)
    # An empty slot must not be read: what is there may be anything.
    weight[index.slot_blocks < 0] = torch.nan
    wide = unpacked.double()
    y, (dx, dweight, dbias) = (
        cpu.forward(x, weight, bias, index),
        cpu.backward(dy, x, weight, index, EVERYTHING),
    )
    compare(y, reference.forward(x.double(), wide, bias.double(), dense), grid[1] * block)
    expected = reference.backward(dy.double(), x.double(), wide, dense, EVERYTHING)
    compare(dx, expected[0], grid[0] * block)
    compare(dweight, pack(expected[1], index.slot_blocks, block), tokens)
    compare(dbias, expected[2], tokens)
    assert dweight.shape == weight.shape and (dweight[index.slot_blocks < 0] == 0).all()

    assert torch.equal(y, cpu.forward(x, unpacked, bias, dense))
    theirs = cpu.backward(dy, x, unpacked, dense, EVERYTHING)
    assert torch.equal(dx, theirs[0]) and torch.equal(dbias, theirs[2])
    assert torch.equal(dweight, pack(theirs[1], index.slot_blocks, block))


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.sampled_from([16, 32, 64, 128]),
    tokens=st.sampled_from([1, 2, 5, 13, 127, 129, 300]),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_products_match_float64_and_dense_storage(grid, block, tokens, density, dtype, seed) -> None:
    check(grid, block, tokens, density, dtype, seed)


@pytest.mark.parametrize("layout", ["MEGASPARSE_PAIRS", "MEGASPARSE_TILES"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 18, 301])
def test_pairs_and_tiles_of_bfloat16(monkeypatch, layout, block, tokens) -> None:
    """The layouts of AVX-512-BF16 and AMX, with their instructions spelt out where the processor has none."""
    monkeypatch.setattr(cpu, "_library", lambda: cpu.declare(load_library(cpu.SOURCE, layout)))
    check((3, 5), block, tokens, 0.5, torch.bfloat16, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 64])
def test_equal_bits_in_every_run_and_at_any_number_of_threads(dtype, block) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, index = packed_weight((5, 7), block, dtype, generator=generator)
    x, dy, bias = inputs(index, 333, dtype, generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            y = cpu.forward(x, weight, bias, index)
            results.append((y, *cpu.backward(dy, x, weight, index, EVERYTHING)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_takes_it_through_autograd(dtype) -> None:
    """Also a weight that is no contiguous tensor, as a view of a flat buffer may be, and a full grid."""
    generator = torch.Generator().manual_seed(5)
    weight0, index = packed_weight((3, 4), 32, dtype, density=1.0, generator=generator)
    x0, dy, bias0 = inputs(index, 45, dtype, generator)
    flat = torch.zeros(weight0.numel() + 1, dtype=dtype)
    misaligned = flat[1:].view_as(weight0).copy_(weight0)
    results = []
    for kernel, stored in (("auto", weight0), ("cpu", misaligned), ("cpu", weight0.mT.contiguous().mT)):
        x, weight, bias = leaf(x0.view(5, 9, -1)), stored.detach().requires_grad_(), leaf(bias0)
        y = packed_linear(x, weight, bias, index, kernel)
        y.backward(dy.view_as(y))
        results.append((y, x.grad, weight.grad, bias.grad))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
