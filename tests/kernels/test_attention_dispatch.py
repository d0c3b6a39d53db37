"""Which attention kernel runs, when a pattern may be widened, and full attention with documents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasparse.kernels import hybrid_attention as kernels
from megasparse.kernels.common.tables import BreakEvenTable, Measurement, find_nearest, read_once
from megasparse.kernels.hybrid_attention import (
    KERNELS,
    PATTERNS,
    break_even,
    causal,
    cpu,
    fast_kernel,
    hybrid_attention,
    measure,
    select_kernel,
    widened,
)
from megasparse.kernels.hybrid_attention.break_even import TABLE, UNMEASURED, Row, dense_limit, mask_limit
from megasparse.kernels.hybrid_attention.measure import measure_rows
from megasparse.utils.hardware import hardware_name

TIMES = {
    "128": {"kernel": 3.0, "mask": 2.0, "dense": 1.0},
    "256": {"kernel": 4.0, "mask": 5.0, "dense": 3.0},
    "512": {"kernel": 5.0, "mask": 9.0, "dense": 6.0},
}
FAST = fast_kernel("cpu", torch.float32, 64)
ROW = Row(FAST, "float32", "sparse", 64, 64, 4, TIMES)
CASE = (FAST, "sparse", 64, "cpu", torch.float32, 64)


def measurement(*rows: Row, hardware: str | None = None) -> Measurement:
    hardware = hardware_name("cpu") if hardware is None else hardware
    facts = {"torch": "2"}, "tools/tune_kernels.py --attention", "2026-01-01"
    return Measurement(hardware, "cpu", torch.get_num_threads(), rows, *facts)


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The user's own table, not there yet, and a shipped one without rows."""
    path, shipped = tmp_path / "own.json", tmp_path / "shipped.json"
    TABLE.write(shipped, [])
    monkeypatch.setattr(BreakEvenTable, "own", lambda table: path)
    monkeypatch.setattr(break_even, "TABLE", replace(TABLE, shipped=shipped))
    return path


def inputs(seq_length: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    shapes = [(2, heads, seq_length, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_nothing_is_built_for_sequences_that_are_too_short_for_it(own, monkeypatch) -> None:
    def build(source: Path) -> None:
        raise AssertionError("it builds")

    monkeypatch.setattr(cpu, "no_compiler", lambda: None)
    monkeypatch.setattr(cpu, "build_failure", build)
    TABLE.write(own, [measurement(replace(ROW, kernel="cpu"))])
    assert select_kernel("auto", "sparse", 255, 64) == "reference"
    with pytest.raises(AssertionError, match="it builds"):
        select_kernel("auto", "sparse", 256, 64)


def test_the_shipped_table_is_whole_and_installed(repository) -> None:
    for measured in TABLE.read(TABLE.shipped):
        assert measured.hardware and measured.command and measured.date
        for row in measured.rows:
            alike = [other.pattern for other in measured.rows if kind(other) == kind(row)]
            assert sorted(alike) == sorted(set(PATTERNS) - {"full"})
            assert all(seconds > 0 for times in row.seconds.values() for seconds in times.values())
    assert "kernels/*/*.json" in (repository / "setup.py").read_text()


def kind(row: Row) -> Row:
    return replace(row, pattern="", seconds={})


def test_break_even_lengths() -> None:
    assert (ROW.limit("mask"), ROW.limit("dense")) == (256, 512)
    slower = {**TIMES, "1024": {"kernel": 9.0, "mask": 8.0, "dense": 9.0}}
    assert (replace(ROW, seconds=slower).limit("mask"), replace(ROW, seconds=slower).limit("dense")) == (1025, 512)
    always = replace(ROW, seconds={"256": TIMES["512"], "64": TIMES["512"]})
    assert always.limit("mask") is None and always.limit("dense") is None and always.lengths == [64, 256]


def test_the_table_decides(own) -> None:
    assert mask_limit(*CASE) == UNMEASURED[FAST, "cpu"] and dense_limit(*CASE) == 0, "nobody measured"
    assert mask_limit(FAST, "sparse", 64, "cuda", torch.float32, 64) > 10**9
    far = replace(ROW, head_dim=256, seconds={"128": TIMES["512"]})
    TABLE.write(own, [measurement(ROW, far)])
    for cached in (find_nearest, read_once):
        cached.cache_clear()
    assert mask_limit(*CASE) == 256 and dense_limit(*CASE) == 512
    assert mask_limit(*CASE[:-1], 200) == 128 and dense_limit(*CASE[:-1], 200) == 0
    assert dense_limit(FAST, "local", *CASE[2:]) == 0
    assert [select_kernel("auto", "sparse", tokens, 64) for tokens in (255, 256)] == ["reference", FAST]
    assert widened("auto", ("sparse", "local", "full"), 511, 64) == ("full", "local", "full")
    assert widened("auto", ("sparse",), 512, 64) == ("sparse",)
    assert widened("tiled", ("sparse",), 10, 64) == ("sparse",), "a forced kernel is not left"


def test_full_attention_runs_where_it_was_measured_to_be_faster(own, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, "cpu": replace(KERNELS["cpu"], why_not=lambda *place: None)})
    shape = 64, "cpu", torch.bfloat16, 32

    def chosen(*lengths: int, asked: str = "auto", **options: bool) -> list[str]:
        return [select_kernel(asked, "full", length, *shape, **options) for length in lengths]

    assert chosen(128, 1024) == ["causal"] * 2, "nobody measured"
    lost = {"kernel": 9.0, "mask": 8.0, "dense": 8.0}
    row = Row("cpu", "bfloat16", "full", 16, 64, 4, {"128": TIMES["512"], "1024": lost})
    TABLE.write(own, [measurement(row, replace(row, dtype="float32", seconds={"128": lost}))])
    for cached in (find_nearest, read_once):
        cached.cache_clear()
    # The nearest length decides, whatever the stride is.
    assert chosen(128, 361, 363, 1024, 9999) == ["cpu"] * 2 + ["causal"] * 3
    assert chosen(127) == ["causal"], "too short to gain by it"
    assert chosen(128, asked="causal") == ["causal"]
    # With documents torch's kernel would have to be called for each of them.
    assert chosen(127, 128, 1024, documents=True) == ["causal", "cpu", "cpu"]
    assert select_kernel("auto", "full", 128, 64, "cpu", torch.float32, 32) == "causal"
    assert select_kernel("auto", "full", 128, 64, "cuda", torch.bfloat16, 32, planned=True) == "causal"
    monkeypatch.setattr(kernels, "KERNELS", {**KERNELS, "cpu": replace(KERNELS["cpu"], why_not=lambda *place: "no")})
    assert chosen(128) + chosen(128, documents=True) == ["causal"] * 2


def test_full_attention_is_measured_against_torch_alone(monkeypatch) -> None:
    monkeypatch.setattr(measure, "pattern_mask", None)
    (row,) = measure_rows(
        "tiled", "cpu", torch.float32, stride=8, head_dim=8, lengths=(16,), heads=1, rounds=1, patterns=["full"]
    )
    assert row.pattern == "full" and row.seconds["16"]["mask"] == row.seconds["16"]["dense"]
    assert all(seconds > 0 for seconds in row.seconds["16"].values())


def test_another_machine_does_not_count(own) -> None:
    TABLE.write(own, [measurement(ROW, hardware="another")])
    read_once.cache_clear()
    assert mask_limit(*CASE) == UNMEASURED[FAST, "cpu"] and dense_limit(*CASE) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "attention_break_even.json"),
        ('{"format": "megasparse-break-even-1", "measurements": []}', TABLE.form),
        (json.dumps({"format": TABLE.form, "measurements": [{"rows": [{"seconds": {}}]}]}), "seconds: empty"),
        (json.dumps({"format": TABLE.form, "measurements": [{"rows": [{"seconds": {"a": {}}}]}]}), "'a'"),
        (json.dumps({"format": TABLE.form, "measurements": [{"rows": [{"seconds": {"1": {}}}]}]}), "kernel"),
    ],
)
def test_a_bad_table_is_named_and_passed_over(content, message, own, tmp_path, monkeypatch) -> None:
    path = tmp_path / "attention_break_even.json"
    path.write_text(content)
    monkeypatch.setattr(BreakEvenTable, "own", lambda table: path)
    with pytest.raises(ValueError, match=message):
        TABLE.read(path)
    assert message in break_even.TABLE.problem() and dense_limit(*CASE) == 0


def test_measured_rows_are_what_was_asked_for() -> None:
    rows = measure_rows("tiled", "cpu", torch.float32, stride=8, head_dim=8, lengths=(32, 16), heads=1, rounds=1)
    assert [row.pattern for row in rows] == ["local", "strided", "sparse", "fixed"]
    for row in rows:
        assert row.lengths == [16, 32] and (row.stride, row.head_dim, row.heads, row.kernel) == (8, 8, 1, "tiled")
        assert all(seconds > 0 for times in row.seconds.values() for seconds in times.values())


@pytest.mark.parametrize("cuts", [[40, 40], [1, 17, 30, 40], list(range(1, 41))], ids=["one", "some", "single tokens"])
def test_full_attention_document_by_document(cuts) -> None:
    documents = torch.stack([torch.bucketize(torch.arange(40), torch.tensor(cuts), right=True), torch.arange(40) // 20])
    q, k, v = inputs(40)
    wanted, got = (hybrid_attention(q, k, v, "full", 4, kernel, documents) for kernel in ("reference", "auto"))
    assert select_kernel("auto", "full", 40, 4) == "causal"
    dy = torch.randn_like(wanted)
    pairs = [torch.autograd.grad(y, (q, k, v), dy) for y in (got, wanted)]
    # float64 on both sides: sums of at most 40 terms of order 1.
    for mine, reference in zip((got, *pairs[0]), (wanted, *pairs[1]), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-10)


def test_full_attention_with_documents_makes_no_square_mask(monkeypatch) -> None:
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        causal.F,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: seen.append((q.shape[2], options)) or attention(q, k, v, **options),
    )
    documents = torch.tensor([[0] * 25 + [4] * 15, [1] * 40])
    hybrid_attention(*inputs(40), "full", 4, documents_BT=documents)
    assert [length for length, _ in seen] == [25, 15, 40]
    assert all(options["is_causal"] and "attn_mask" not in options for _, options in seen)
