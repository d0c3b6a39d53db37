"""Products with packed weights against float64, for all layouts and dtypes, and what must not change their bits."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from megasparse.kernels.common.build import load_library
from megasparse.kernels.quantized import quantize_tokens
from megasparse.kernels.sparse_inference import (
    CompressedWeight,
    compress,
    compressed_linear,
    cpu,
    decompress,
    reference,
    why_not,
)

REASON = why_not("cpu")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [pytest.param(x, id=str(x).partition(".")[2]) for x in (torch.float32, torch.bfloat16, torch.int8)]
ROUNDING = 2.0**-24
# Rows of x: few of them are multiplied without unpacking, others in tiles of 6 and what is left, many by dense products
# or in several passes.
BATCHES = (1, 2, 3, 4, 5, 16, 64)
# (outputs, inputs, kind, side of the blocks): odd widths, one of either, N:M, all sizes of blocks.
LAYOUTS = [
    (1, 1, "unstructured", None),
    (37, 129, "unstructured", None),
    (66, 320, "unstructured", None),
    (37, 129, "dense", None),
    (8, 64, "dense", None),
    (24, 128, "16:32", None),
    (24, 128, "16:64", None),
    (24, 20, "blocks", 4),
    (24, 40, "blocks", 8),
    (48, 80, "blocks", 16),
    (64, 96, "blocks", 32),
    (192, 128, "blocks", 64),
]
CASES = [pytest.param(*case, id="-".join(map(str, case))) for case in LAYOUTS]


def random_weight(outputs: int, inputs: int, kind: str, side: int | None, dtype: torch.dtype) -> Tensor:
    """A quarter of it active; its first row of units full and its last one empty."""
    if ":" in kind:
        active, group = map(int, kind.split(":"))
        mask = torch.rand(outputs, inputs // group, group).argsort(-1).argsort(-1).lt(active).view(outputs, inputs)
    else:
        step = side or 1
        mask = torch.rand(outputs // step, inputs // step) < 0.25
        if len(mask) > 1:
            mask[0], mask[-1] = True, False
        mask = mask.repeat_interleave(step, 0).repeat_interleave(step, 1)
    dense = torch.randn(outputs, inputs) if dtype.is_floating_point else torch.randint(-127, 128, (outputs, inputs))
    return (dense * mask).to(dtype)


def packed(weight: Tensor, kind: str, side: int | None) -> CompressedWeight:
    scales = None if weight.dtype.is_floating_point else torch.rand(len(weight)) * 0.02 + 1e-3
    return compress(weight, scales_O=scales, kind="unstructured" if ":" in kind else kind, block_size=side)


def check(y: Tensor, x: Tensor, weight: CompressedWeight, bias: Tensor | None) -> None:
    """Of float32: a chain of I / 8 additions at most in each of the lanes, at most 5 that join them, products, bias.

    The weights of bfloat16 are widened exactly, so that theirs is the same. Sums of int8 are exact; then come the
    conversion, the two scales, and the bias.
    """
    matrix, added = decompress(weight).double(), 0 if bias is None else bias.double()
    if weight.scales_O is None:
        terms, expected, size = weight.shape[1] / 8 + 7, x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    else:
        q, scales = quantize_tokens(x)
        terms, expected = 5, (q.double() @ matrix.T) * scales.double() * weight.scales_O.double()
        size = expected.abs()
    limit = terms * ROUNDING * (size + abs(added) + 1e-30)
    assert bool(((y.double() - expected - added).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs, inputs, kind, side", CASES)
def test_products(outputs, inputs, kind, side, dtype) -> None:
    """Against float64, at each number of rows; two threads change no bit, and neither do other rows beside one, unless
    they are so many that dense products take over."""
    matrix = random_weight(outputs, inputs, kind, side, dtype)
    weight, bias = packed(matrix, kind, side), torch.randn(outputs)
    assert torch.equal(decompress(weight), matrix)
    x, threads = torch.randn(max(BATCHES), inputs), torch.get_num_threads()
    x[2] = 0
    alone = torch.cat([compressed_linear(row, weight, bias) for row in x.split(1)])
    check(alone, x, weight, bias)
    check(compressed_linear(x, weight), x, weight, None)
    for batch in BATCHES:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(compressed_linear(x[:batch], weight, bias))
            torch.set_num_threads(threads)
        assert torch.equal(*found), batch
        if batch < cpu.MANY_ROWS or weight.kind == "blocks" or dtype == torch.int8:
            assert torch.equal(found[0], alone[:batch]), batch
        else:
            check(found[0], x[:batch], weight, bias)


@pytest.mark.parametrize("definition", ["MEGASPARSE_PLAIN", "MEGASPARSE_NARROW", "MEGASPARSE_WIDE"])
def test_without_the_instructions(definition, monkeypatch) -> None:
    """The versions for other processors give the same sums; their code is compiled for this one."""
    library = cpu.declare(load_library(cpu.SOURCE, definition))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    for outputs, inputs, kind, side in LAYOUTS:
        for dtype in cpu.TYPES:
            weight = packed(random_weight(outputs, inputs, kind, side, dtype), kind, side)
            for batch in (1, 9):
                x = torch.randn(batch, inputs)
                check(compressed_linear(x, weight), x, weight, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_dtype_plays_no_part(dtype) -> None:
    """The kernels write float32, whatever torch makes where nothing is said."""
    weight, x = packed(random_weight(48, 64, "unstructured", None, dtype), "unstructured", None), torch.randn(3, 64)
    expected, usual = compressed_linear(x, weight), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(compressed_linear(x, weight), expected)
    finally:
        torch.set_default_dtype(usual)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(dtype) -> None:
    weight, x, bias = (
        packed(random_weight(48, 64, "blocks", 16, dtype), "blocks", 16),
        torch.randn(5, 64),
        torch.randn(48),
    )
    check(reference.linear(x, weight, bias), x, weight, bias)


def test_integers_do_not_depend_on_the_layout() -> None:
    matrix, x = random_weight(64, 128, "blocks", 32, torch.int8), torch.randn(7, 128)
    found = [
        compressed_linear(x, packed_with_unit_scales(matrix, kind)) for kind in ("dense", "unstructured", "blocks")
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def packed_with_unit_scales(matrix: Tensor, kind: str) -> CompressedWeight:
    return compress(matrix, scales_O=torch.ones(len(matrix)), kind=kind)


@pytest.mark.parametrize(
    ("times", "sparsity"),
    [((6.0, 5.0), 0.0), ((8.0, 6.0), 0.25), ((12.0, 8.0), 0.625), ((11.0, 11.0), None), ((9.0, 9.0), 0.0)],
)
def test_break_even_of_the_benchmark(repository, monkeypatch, times, sparsity) -> None:
    """Dense takes 10; `times` are those at 50 and 75 %. None: never faster."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    rows = [{"name": "dense fp32", "milliseconds_per_token": 10.0}]
    for own, milliseconds in zip((0.5, 0.75), times, strict=True):
        row = {"name": f"{own:.0%} unstructured fp32", "format": "unstructured", "values": "fp32", "sparsity": own}
        rows.append(row | {"milliseconds_per_token": milliseconds})
    assert importlib.import_module("sparse_decoding").break_even(rows) == {"unstructured fp32": sparsity}


def test_rounding_of_the_inputs_to_int8() -> None:
    """Each input moves by half a step at most, of which 127 are the largest of its row."""
    matrix, x = random_weight(33, 200, "unstructured", None, torch.int8), torch.randn(6, 200)
    weight = packed_with_unit_scales(matrix, "unstructured")
    exact = x.double() @ matrix.double().T
    steps = x.double().abs().amax(1, keepdim=True) / 127
    limit = 0.5 * steps * matrix.double().abs().sum(1) * (1 + 1e-4)
    assert bool(((compressed_linear(x, weight).double() - exact).abs() <= limit).all())


def test_numbers_that_are_none_stay_so() -> None:
    """Rounded to int8, infinity and what is no number would become ordinary ones."""
    weight = packed_with_unit_scales(random_weight(33, 200, "unstructured", None, torch.int8), "unstructured")
    x = torch.randn(5, 200)
    x[1, 7], x[3, 199], x[4] = torch.nan, -torch.inf, 1e-45
    for y in (compressed_linear(x, weight), reference.linear(x, weight, None)):
        assert y[[1, 3]].isnan().all() and y[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_half_precision(dtype) -> None:
    """They are widened, and the result is rounded once."""
    weight = compress(random_weight(40, 64, "unstructured", None, torch.bfloat16), kind="unstructured")
    x = torch.randn(2, 3, 64).to(dtype)
    y = compressed_linear(x, weight)
    assert y.dtype == dtype and y.shape == (2, 3, 40)
    assert torch.equal(y, compressed_linear(x.float(), weight).to(dtype))


def test_many_inputs_of_bfloat16() -> None:
    """By torch's product of bfloat16, in sums of float32: what is rounded is the result."""
    matrix, x = random_weight(300, 70, "unstructured", None, torch.bfloat16), torch.randn(50, 70).to(torch.bfloat16)
    y = compressed_linear(x, compress(matrix, kind="unstructured"))
    exact = x.double() @ matrix.double().T
    assert y.dtype == torch.bfloat16
    size = x.double().abs() @ matrix.double().abs().T
    assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 16 * ROUNDING * size + 1e-30).all())


def test_largest_integers() -> None:
    """65,536 times 127 * 127 and the 128 that is added to each input stay within int32."""
    weight = compress(torch.full((1, 2**16), 127, dtype=torch.int8), scales_O=torch.ones(1), kind="dense")
    assert float(compressed_linear(torch.ones(1, 2**16), weight)) == pytest.approx(2**16 * 127, rel=1e-6)


def test_the_layout_follows_the_zeros() -> None:
    def kind_of(matrix: Tensor) -> tuple[str, int]:
        weight = compress(matrix)
        return weight.kind, weight.block_size

    assert kind_of(random_weight(64, 128, "blocks", 16, torch.float32)) == ("blocks", 16)
    assert kind_of(random_weight(64, 128, "unstructured", None, torch.float32)) == ("unstructured", 1)
    assert kind_of(torch.randn(64, 128)) == ("dense", 1)
    assert kind_of(random_weight(64, 128, "16:64", None, torch.float32)) == ("unstructured", 1)
    # A few zeros by chance do not break a block.
    matrix = random_weight(128, 128, "blocks", 64, torch.float32)
    matrix[0, 5] = 0
    assert kind_of(matrix) == ("blocks", 64)


def test_bytes_at_rest() -> None:
    """4 d + 1/8 of fp32, and a number for each row."""
    matrix = torch.randn(256, 1024) * (torch.rand(256, 1024) < 0.25)
    weight, active = compress(matrix), int((matrix != 0).sum())
    assert weight.num_bytes == 4 * (active + 64) + 256 * 1024 // 8 + 8 * 257
    assert weight.density == active / matrix.numel()


def test_refusals() -> None:
    integers = torch.ones(8, 64, dtype=torch.int8)
    for arguments, options, text in [
        ((torch.ones(8, 64, dtype=torch.float64),), {}, "float64"),
        ((torch.ones(64),), {}, r"must be \[out, in\]"),
        ((integers,), {}, "scales: none with torch.int8"),
        ((torch.ones(8, 64),), {"scales_O": torch.ones(8)}, "must be given with torch.int8"),
        ((integers,), {"scales_O": torch.ones(7)}, r"must be \[8\]"),
        ((integers,), {"scales_O": torch.full((8,), torch.nan)}, "finite"),
        ((-128 * integers,), {"scales_O": torch.ones(8)}, "-128"),
        ((torch.ones(8, 64),), {"kind": "csr"}, "csr; must be one of auto, dense, unstructured, blocks"),
        ((torch.ones(8, 64),), {"kind": "blocks", "block_size": 16}, "block_size: 16 .* must be 4, 8"),
        ((torch.ones(7, 64),), {"kind": "blocks"}, "no side"),
        ((torch.ones(1, 2**16 + 1),), {}, "65536"),
    ]:
        with pytest.raises(ValueError, match=text):
            compress(*arguments, **options)
    x = torch.ones(1, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no_grad"):
        compressed_linear(x, compress(torch.ones(8, 64)))
