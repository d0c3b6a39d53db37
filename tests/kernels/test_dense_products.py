"""Dense products by oneDNN against float64, alone and in the layers that choose them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.dense_kernels import dense_kernels
from megasparse.kernels import dense_products
from megasparse.kernels.block_sparse import build_index, sparse_linear
from megasparse.kernels.common import tables
from megasparse.kernels.common.tables import Measurement, this_machine
from megasparse.kernels.dense_products import dense_linear, onednn, pieces, table, transposition
from megasparse.layers import HeadInChunks, Linear, SparseLinear, Vocabulary
from megasparse.models.build import build_model
from megasparse.parallel import TensorParallel

REASON = onednn.why_not("cpu", torch.float32)
needs_onednn = pytest.mark.skipif(REASON is not None, reason=str(REASON))
HALF_REASON = onednn.why_not("cpu", torch.bfloat16)
needs_half = pytest.mark.skipif(HALF_REASON is not None, reason=str(HALF_REASON))
# (tokens, in, out): odd numbers, one token, one output, and what a tile divides.
SHAPES = [(1, 1, 1), (1, 64, 192), (7, 33, 5), (64, 64, 64), (37, 129, 257), (301, 96, 1)]


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("MEGASPARSE_CACHE", str(tmp_path / "cache"))
    tables.forget()
    yield
    tables.forget()


def close(found: Tensor, expected: Tensor, terms: int) -> None:
    """Sums of `terms` products: 2^-24 of each, of which the largest is about 16, and of what each addition finds, 4 on
    average."""
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-24 * (16 + 4 * terms))


@needs_onednn
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_gradients(shape, has_bias) -> None:
    tokens, inner, outer = shape
    inputs = [torch.randn(tokens, inner), torch.randn(outer, inner), *([torch.randn(outer)] if has_bias else [])]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    y, expected = dense_linear(*ours, *([] if has_bias else [None]), kernel="onednn"), F.linear(*exact)
    close(y.detach(), expected.detach(), inner + 1)
    dy = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.double())
    for one, other, terms in zip(found, wanted, (outer, tokens, tokens), strict=False):
        close(one, other, terms)


@needs_half
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (61, 24, 2 * pieces.OUTPUTS + 70), (40, 200, 16), (40, 16, 200)], ids=str)
def test_products_and_gradients_in_bfloat16(shape, has_bias) -> None:
    tokens, inner, outer = shape
    inputs = [torch.randn(tokens, inner), torch.randn(outer, inner), *([torch.randn(outer)] if has_bias else [])]
    ours = [x.bfloat16().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in ours]
    y, expected = dense_linear(*ours, *([] if has_bias else [None]), kernel="onednn"), F.linear(*exact)
    dy = torch.randn_like(y)
    found, wanted = torch.autograd.grad(y, ours, dy), torch.autograd.grad(expected, exact, dy.double())
    for one, other, terms in zip((y, *found), (expected, *wanted), (inner + 1, outer, tokens, tokens), strict=False):
        # Sums in float32, as above, and one rounding to 8 bits; torch adds up the gradient of a bias likewise.
        torch.testing.assert_close(one.double(), other, rtol=2**-8, atol=2**-24 * (16 + 4 * terms))


@needs_half
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "no tokens"])
def test_layouts_in_bfloat16(layout) -> None:
    x = {
        "transposed": lambda: torch.randn(24, 10).bfloat16().t(),
        "strided": lambda: torch.randn(10, 48).bfloat16()[:, ::2],
        "expanded": lambda: torch.randn(1, 24).bfloat16().expand(10, 24),
        "no tokens": lambda: torch.randn(0, 24).bfloat16(),
    }[layout]()
    weight = torch.randn(40, 24).bfloat16().requires_grad_()
    y = dense_linear(x, weight, None, kernel="onednn")
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=2**-8, atol=2**-24 * 112)
    for dy in (torch.ones(1, 1).bfloat16().expand(*y.shape), torch.randn(40, len(x)).bfloat16().t()):
        (found,) = torch.autograd.grad(y, weight, dy, retain_graph=True)
        torch.testing.assert_close(found.double(), dy.double().t() @ x.double(), rtol=2**-8, atol=2**-24 * 56)


@pytest.mark.parametrize("can_build", [True, False])
@pytest.mark.parametrize(
    "size", [(1, 1), (8, 8), (7, 40), (33, 64), (1, 50), (50, 1), (100, 65), (0, 5), (5, 0)], ids=str
)
def test_transposed_copies(size, can_build, monkeypatch) -> None:
    if not can_build:
        monkeypatch.setattr(transposition, "build_failure", lambda source: "no compiler")
    rows, columns = size
    wide = torch.randn(rows, columns + 3).bfloat16()
    matrix, target = wide[:, 2 : columns + 2], torch.full((columns + 2, rows + 5), 7.0).bfloat16()
    transposition.transpose_into(target[1 : columns + 1, 3 : rows + 3], matrix)
    expected = torch.full((columns + 2, rows + 5), 7.0).bfloat16()
    expected[1 : columns + 1, 3 : rows + 3] = matrix.t()
    assert torch.equal(target, expected)
    found = transposition.transposed(matrix)
    assert torch.equal(found, matrix.t()) and found.is_contiguous()
    assert torch.equal(transposition.transposed(matrix.t()), matrix)


@needs_onednn
@pytest.mark.parametrize("layout", ["3 dimensions", "transposed", "strided", "expanded", "no tokens"])
def test_layouts(layout) -> None:
    x = {
        "3 dimensions": lambda: torch.randn(2, 5, 24),
        "transposed": lambda: torch.randn(24, 10).t(),
        "strided": lambda: torch.randn(10, 48)[:, ::2],
        "expanded": lambda: torch.randn(1, 24).expand(10, 24),
        "no tokens": lambda: torch.randn(0, 24),
    }[layout]()
    weight, bias = torch.randn(40, 24, requires_grad=True), torch.randn(40)
    y = dense_linear(x, weight, bias, kernel="onednn")
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert y.shape == expected.shape
    close(y, expected, 25)
    dy = torch.ones(1, 1).expand(*y.shape)
    wanted = dy.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
    close(torch.autograd.grad(y, weight, dy)[0], wanted, max(len(x), 1) * 10)


@needs_onednn
@pytest.mark.parametrize("shape", [(37, 1024, 1030), (64, 128, 512)], ids=str)
def test_large_and_small_weight_gradients(shape) -> None:
    tokens, inner, outer = shape
    x, dy = torch.randn(tokens, inner), torch.randn(tokens, outer)
    assert (inner * outer >= onednn.LARGE) == (inner == 1024)
    close(onednn.weight_gradient(dy, x), dy.double().t() @ x.double(), tokens)


@needs_onednn
def test_only_what_is_needed_is_computed(monkeypatch) -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    y = onednn.linear(x, weight)
    calls, product = [], onednn.product
    monkeypatch.setattr(onednn, "product", lambda *words: calls.append(words) or product(*words))
    y.sum().backward()
    assert len(calls) == 1 and weight.grad is not None


@needs_onednn
@pytest.mark.parametrize("shape", [(512, 768, 768), (333, 128, 512), (64, 768, 2304), (700, 1024, 1040)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_tokens(shape) -> None:
    tokens, inner, outer = shape
    x, weight, dy = torch.randn(tokens, inner), torch.randn(outer, inner), torch.randn(tokens, outer)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([onednn.product(x, weight), onednn.product(dy, weight.t()), onednn.weight_gradient(dy, x)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
    some = slice(tokens // 3, tokens // 2)
    assert torch.equal(onednn.product(x[some].clone(), weight), found[0][0][some])
    assert torch.equal(onednn.product(dy[some].clone(), weight.t()), found[0][1][some])


@needs_onednn
@pytest.mark.parametrize("dense_gradient", [False, True])
@pytest.mark.parametrize(("unit", "kernel"), [(1, "dense"), (16, "dense"), (16, "reference")])
def test_a_sparse_layer_that_runs_dense_or_has_a_dense_gradient(unit, kernel, dense_gradient) -> None:
    mask = torch.rand(48 // unit, 64 // unit) < 0.5
    entries = mask.repeat_interleave(unit, 0).repeat_interleave(unit, 1)
    weight = (torch.randn(48, 64) * entries).requires_grad_()
    x, index = torch.randn(21, 64, requires_grad=True), build_index(mask, unit)
    y = sparse_linear(x, weight, None, index, dense_gradient, kernel, dense="onednn")
    y.square().sum().backward()
    wide, own = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    F.linear(wide, own).square().sum().backward()
    bound = float(own.grad.abs().max()) * 1e-5
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=0, atol=bound)
    wanted = own.grad if dense_gradient else own.grad * entries
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=0, atol=bound)
    assert dense_gradient or (weight.grad[~entries] == 0).all()


@needs_onednn
@pytest.mark.parametrize("kind", [Linear, SparseLinear])
def test_layers_and_head_take_it(kind, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("oneDNN has been asked for")

    settings = {"block_size": 16} if kind is SparseLinear else {}
    head = kind("head", 32, 48, bias=False, init_std=0.5, dense_kernel="onednn", **settings)
    x, targets = torch.randn(3, 7, 32, requires_grad=True), torch.randint(43, (3, 7))
    wide, weight = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    expected = F.cross_entropy(F.linear(wide, weight)[..., :43].flatten(0, 1), targets.flatten())
    expected.backward()
    chunked = HeadInChunks(head, Vocabulary(43, 48, TensorParallel()), chunk_elements=5 * 48)
    monkeypatch.setattr(F, "linear", fail)
    loss = chunked(x, chunked.vocabulary.next_token_losses(targets))
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    for ours, gradient in ((x.grad, wide.grad), (head.weight.grad, weight.grad)):
        torch.testing.assert_close(ours.double(), gradient, rtol=0, atol=float(gradient.abs().max()) * 1e-5)


def test_what_it_cannot_do_is_torchs(monkeypatch) -> None:
    for dtype in (torch.float16, torch.float64):
        assert "dtype" in onednn.why_not("cpu", dtype)
        assert dense_products.choose("onednn", "cpu", dtype, 10, (8, 8)) == "torch"
        x, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
        assert torch.equal(dense_linear(x, weight, None, kernel="onednn"), F.linear(x, weight))
    assert "cuda" in onednn.why_not("cuda", torch.float32)
    monkeypatch.setattr(onednn, "product", lambda *words: pytest.fail("a traced program has torch's operators"))
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    dense_linear(torch.randn(3, 8), torch.randn(4, 8), None, kernel="onednn")


def test_an_operator_that_is_not_there_or_is_another_one_is_not_used(monkeypatch) -> None:
    for product, words in ((lambda *_: torch.zeros(5, 19), "something else"), (lambda: None, "cannot be called")):
        monkeypatch.setattr(onednn, "product", product)
        onednn._failure.cache_clear()
        assert (
            words in onednn._failure() and dense_products.choose("onednn", "cpu", torch.float32, 9, (8, 8)) == "torch"
        )
    monkeypatch.undo()
    onednn._failure.cache_clear()


def test_a_build_that_does_not_tell_of_bfloat16_has_torchs_products(monkeypatch) -> None:
    onednn._multiplies_bfloat16.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert "no bfloat16" in onednn.why_not("cpu", torch.bfloat16)
    assert dense_products.choose("onednn", "cpu", torch.bfloat16, 10, (8, 8)) == "torch"
    monkeypatch.undo()
    onednn._multiplies_bfloat16.cache_clear()


def test_a_forced_kernel_that_cannot_run_is_refused() -> None:
    words = ["kernels.dense=onednn", "train.precision=fp16", "sparsity.algorithm=dense", "model.num_layers=1"]
    config = load_config([], [*words, "model.hidden_size=32", "model.num_attention_heads=2"])
    with torch.device("meta"):
        model = build_model(config, 64)
    with pytest.raises(ConfigError, match="kernels.dense: onednn cannot be used here: dtype torch.float16.*auto or"):
        dense_kernels(config, model, "cpu")


@needs_onednn
def test_traced_blocks_have_torchs_products_in_the_plan_and_the_head_its_own() -> None:
    words = ["kernels.dense=onednn", "train.precision=fp32", "train.compile=blocks", "model.vocab_size=64"]
    config = load_config([], words)
    with torch.device("meta"):
        model = build_model(config, 64)
    found = {row["layer"]: row["kernel"] for row in dense_kernels(config, model, "cpu")}
    assert found.pop("head") == "onednn" and set(found.values()) == {"torch"}


@needs_onednn
def test_measured_rows_decide_near_their_tokens() -> None:
    rows = (
        table.Row("float32", 512, 64, 192, {"torch": 2.0, "onednn": 1.0}),
        table.Row("float32", 256, 192, 64, {"torch": 1.0, "onednn": 2.0}, (2048, 192, 64)),
    )
    machine = this_machine("cpu")
    facts = {"hardware": machine.hardware, "model": machine.model, "device": "cpu", "threads": machine.threads}
    table.TABLE.write(table.TABLE.own(), [Measurement(rows=rows, versions={}, **facts)])
    tables.forget()
    choose = dense_products.choose
    assert table.TABLE.own_rows("cpu") == rows
    assert choose("auto", "cpu", torch.float32, 512, (64, 192)) == "onednn"
    assert choose("auto", "cpu", torch.float32, 2048, (192, 64)) == "torch"
    assert choose("torch", "cpu", torch.float32, 512, (64, 192)) == "torch"
    assert choose("auto", "cpu", torch.float32, 4, (64, 192)) == "torch", "too few tokens"
    assert choose("auto", "cpu", torch.bfloat16, 512, (64, 192)) == "torch"


@needs_onednn
def test_a_row_is_measured() -> None:
    row = table.measure_row(torch.float32, tokens=16, widths=(32, 48), rounds=1)
    assert row.sizes == (16, 32, 48) and row.seconds.keys() == {"torch", "onednn"} and row.fastest in row.seconds


@pytest.mark.parametrize("change", [{"seconds": {"torch": 1.0}}, {"counts_for": [1, 2]}, {"tokens": "many"}])
def test_a_broken_table_is_told(change, tmp_path) -> None:
    row = {"dtype": "float32", "tokens": 8, "in": 8, "out": 8, "seconds": {"torch": 1.0, "onednn": 2.0}} | change
    facts = {"hardware": "x", "device": "cpu", "threads": 1, "versions": {}, "command": "", "date": ""}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"format": table.TABLE.form, "measurements": [{**facts, "rows": [row]}]}))
    with pytest.raises(ValueError, match="no table of break-even measurements"):
        table.TABLE.read(path)
