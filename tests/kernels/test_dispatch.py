"""Which kernel is chosen: the tables of break-even densities, the choice, and what a plan may not do for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megasparse.kernels.block_sparse import break_even as tables
from megasparse.kernels.block_sparse import (
    build_index,
    check_forced,
    choose,
    cpu,
    explain,
    refresh_index,
    sparse_linear,
)
from megasparse.kernels.block_sparse.break_even import FALLBACK, SHIPPED, TABLE, Row, measured
from megasparse.kernels.block_sparse.measure import (
    LAYERS,
    break_even,
    efficiency,
    host_seconds,
    measure_row,
    parse_shape,
    speedup,
)
from megasparse.kernels.common import build
from megasparse.kernels.common.tables import BreakEvenTable, Measurement, find_nearest, merged, read_once
from megasparse.utils.hardware import hardware_name

F32 = torch.float32
write_table = TABLE.write


def row(break_even: float, *, block: int = 64, tokens: int = 2048, widths=(768, 3072), dtype="float32") -> Row:
    return Row("cpu", dtype, block, tokens, *widths, break_even, 0.4, {"0.1": 0.04, "1": 0.5})


def measurement(*rows: Row, hardware: str | None = None, threads: int | None = None) -> Measurement:
    hardware = hardware_name("cpu") if hardware is None else hardware
    threads = torch.get_num_threads() if threads is None else threads
    return Measurement(hardware, "cpu", threads, rows, {"torch": "2"}, "tools/tune_kernels.py", "2026-01-01")


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """The user's own table, not there yet, and a shipped one that says 0.25."""
    path, shipped = tmp_path / "own" / "break_even.json", tmp_path / "shipped.json"
    write_table(shipped, [measurement(row(0.25), hardware="another", threads=64)])
    monkeypatch.setattr(BreakEvenTable, "own", lambda table: path)
    monkeypatch.setattr(tables, "TABLE", replace(TABLE, shipped=shipped))
    return path


@pytest.fixture
def never_built(monkeypatch) -> None:
    def build_failure(source: Path) -> str:
        raise AssertionError("nothing may be compiled here")

    monkeypatch.setattr(cpu, "build_failure", build_failure)


def test_a_table_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "new" / "table.json"
    wanted = (measurement(row(0.5), row(1.0, block=16)), measurement(row(0.0), hardware="x"))
    write_table(path, wanted)
    assert TABLE.read(path) == wanted
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_the_shipped_table_is_whole_and_installed(repository) -> None:
    found = TABLE.read(SHIPPED)
    assert {row.backend for m in found for row in m.rows} >= {"cpu"}
    assert all(m.hardware and m.command and m.date and m.versions for m in found)
    assert "kernels/*/*.json" in (repository / "setup.py").read_text()


def test_what_is_measured_again_replaces_what_was_known() -> None:
    old = measurement(row(0.1), row(0.2, block=16))
    other = measurement(row(0.3), hardware="another")
    new = measurement(row(0.9))
    assert merged([old, other], new) == [replace(old, rows=old.rows[1:]), other, new]
    assert merged([measurement(row(0.1))], new) == [new]


def test_the_own_table_wins_on_the_hardware_and_threads_it_was_measured_with(own) -> None:
    assert measured("cpu", "cpu", F32, 64, 2048) == 0.25
    for stranger in (measurement(row(0.75), hardware="another"), measurement(row(0.75), threads=63)):
        write_table(own, [stranger])
        forget()
        assert measured("cpu", "cpu", F32, 64, 2048) == 0.25
    write_table(own, [measurement(row(0.75))])
    forget()
    assert measured("cpu", "cpu", F32, 64, 2048) == 0.75
    # Of a dtype that was not measured here the shipped table knows, or nobody.
    assert measured("cpu", "cpu", torch.bfloat16, 64, 2048) == FALLBACK
    assert measured("cpu", "cuda", F32, 64, 2048) == 0.3


@pytest.mark.parametrize(("block", "wanted"), [(16, 0.075), (32, 0.15), (64, 0.3), (128, 0.45), (256, 0.45)])
def test_without_measurements_large_blocks_are_trusted_more_on_gpus(own, block, wanted) -> None:
    assert measured("triton", "cuda", torch.bfloat16, block, 16384) == pytest.approx(wanted)
    assert measured("none", "cpu", torch.bfloat16, block, 16384) == FALLBACK


def test_the_nearest_row_counts(own) -> None:
    rows = [
        row(0.1, block=16),
        row(0.2),
        row(0.3, tokens=512),
        row(0.4, widths=(3072, 768)),
        row(0.5, widths=(64, 64)),
    ]
    write_table(own, [measurement(*rows[:2]), measurement(*rows[2:])])
    find = lambda *case: measured("cpu", "cpu", F32, *case)  # noqa: E731
    assert find(16, 1024, (768, 3072)) == 0.1 and find(32, 512, (768, 3072)) == 0.3, "block and tokens count alike"
    assert find(64, 2048, (768, 2304)) == find(128, 4096, (768, 3072)) == 0.2
    assert find(64, 700, (768, 3072)) == find(64, 700) == 0.3
    assert find(64, 2048, (3072, 1024)) == 0.4
    assert find(64, 2048, (64, 128)) == 0.5


def test_of_shipped_measurements_the_nearest_number_of_threads_counts(own) -> None:
    write_table(tables.TABLE.shipped, [measurement(row(0.1), threads=1), measurement(row(0.4), threads=64)])
    forget()
    assert measured("cpu", "cpu", F32, 64, 2048) == 0.1
    torch.set_num_threads(16)
    assert measured("cpu", "cpu", F32, 64, 2048) == 0.4


def forget() -> None:
    find_nearest.cache_clear()
    read_once.cache_clear()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[]", "format"),
        ('{"format": "other"}', "format"),
        ('{"format": "megasparse-break-even-1"}', "measurements"),
        ('{"format": "megasparse-break-even-1", "measurements": [{"rows": 3}]}', "int"),
        ('{"format": "megasparse-break-even-1", "measurements": [{"rows": [{"break_even": 2}]}]}', "0 to 1"),
        ("\xff", "break_even.json"),
    ],
)
def test_a_corrupt_table_is_named_and_passed_over(own, text, words) -> None:
    own.parent.mkdir()
    own.write_bytes(text.encode("latin-1"))
    forget()
    assert measured("cpu", "cpu", F32, 64, 2048) == 0.25
    problem = tables.TABLE.problem()
    assert str(own) in problem and words in problem
    with pytest.raises(ValueError, match="no table of break-even measurements"):
        TABLE.read(own)


def test_nothing_is_built_for_layers_that_stay_dense(own, never_built) -> None:
    """Else the first step compiles what the plan, which says `dense`, did not have built."""
    assert choose("auto", "cpu", F32, 64, 2048, 0.3) == "dense"
    assert choose("auto", "cpu", F32, 64, 2048, 0.3, break_even=0.2) == "dense"
    with pytest.raises(AssertionError, match="nothing may be compiled"):
        choose("auto", "cpu", F32, 64, 2048, 0.2)


def test_auto_takes_the_kernel_up_to_the_break_even_density(own) -> None:
    write_table(own, [measurement(row(0.4))])
    forget()
    case = ("auto", "cpu", F32, 64, 2048)
    assert [choose(*case, density, planned=True) for density in (0.1, 0.4, 0.41, 1.0)] == ["cpu", "cpu"] + ["dense"] * 2
    assert choose(*case, 0.6, break_even=0.7, planned=True) == "cpu"
    assert choose(*case, 0.1, break_even=0.0, planned=True) == "dense"
    assert choose("auto", "cpu", torch.float16, 64, 2048, 0.1, planned=True) == "dense"
    assert choose("auto", "cpu", F32, 1, 2048, 0.1, planned=True) == "dense"
    assert choose("reference", "cpu", F32, 1, 2048, 0.1) == "reference"


def test_a_plan_compiles_nothing(own, never_built) -> None:
    assert choose("auto", "cpu", F32, 64, 2048, 0.1, planned=True) == "cpu"
    assert choose("cpu", "cpu", F32, 64, 2048, 0.1, planned=True) == "cpu"
    check_forced("cpu", "cpu", F32, 64, planned=True)
    assert explain("cpu", F32, 64, planned=True) == ("cpu", "")


def test_a_plan_sees_that_there_is_no_compiler(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    name, reason = explain("cpu", F32, 64, planned=True)
    assert name is None and "no C++ compiler found: no-such-compiler" in reason
    assert choose("auto", "cpu", F32, 64, 2048, 0.1, planned=True) == "dense"


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "block_size", "words"),
    [
        (
            "cpu",
            "cpu",
            F32,
            1,
            "'cpu' cannot run: sparsity.block_size 1; supported: 16, 32.*here it must be auto, dense",
        ),
        ("cpu", "cpu", F32, 8, "sparsity.block_size 8"),
        ("cpu", "cpu", torch.float16, 64, "dtype torch.float16"),
        ("cpu", "cuda", F32, 64, "on cpu, not on cuda"),
        ("fast", "cpu", F32, 64, "'fast' is unknown; must be one of auto"),
    ],
)
def test_a_forced_kernel_that_cannot_run_is_refused(never_built, kernel, device, dtype, block_size, words) -> None:
    for planned in (False, True):
        with pytest.raises(ValueError, match=words):
            check_forced(kernel, device, dtype, block_size, planned=planned)


def test_a_failed_build_is_told(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "build_failure", lambda source: "cc: exit status 1")
    name, reason = explain("cpu", F32, 64)
    assert name is None and "cc: exit status 1" in reason
    assert choose("auto", "cpu", F32, 64, 2048, 0.1) == "dense"


def test_the_layer_chooses_as_the_table_says(own) -> None:
    """By what only dense products do: they read inactive weights."""
    mask = torch.tensor([[True, False], [True, True]])
    weight, x = torch.ones(32, 32), torch.ones(8, 32)
    used = lambda **options: sparse_linear(x, weight, None, build_index(mask, 16), **options)[0, 0]  # noqa: E731
    write_table(own, [measurement(row(0.8, block=16))])
    forget()
    assert used() == 16 and used(break_even=0.7) == 32 and used(kernel="dense") == 32
    write_table(own, [measurement(row(0.7, block=16))])
    forget()
    assert used() == 32 and used(break_even=0.8) == 16 and used(kernel="cpu") == 16


def test_compiled_code_holds_the_choice_for_any_number_of_tokens(own) -> None:
    write_table(own, [measurement(row(0.6, block=16, tokens=64), row(0.0, block=16, tokens=4))])
    forget()
    mask = torch.tensor([[True, False], [False, True]])
    weight = torch.randn(32, 32).requires_grad_()  # not masked: dense products read its inactive weights
    index = build_index(mask, 16)
    layer = lambda x: sparse_linear(x, weight, None, index).tanh()  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (4, 64, 80):
        x = torch.randn(tokens, 32, requires_grad=True)
        expected, found = layer(x), compiled(x)
        torch.testing.assert_close(found, expected)
        for got, wanted in zip(*(torch.autograd.grad(y.sum(), [x, weight]) for y in (found, expected)), strict=True):
            torch.testing.assert_close(got, wanted)


def test_an_index_is_refreshed_in_place() -> None:
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, :3] = True
    index = build_index(mask, 16)
    places = [entries.data_ptr() for entries in index.lists]
    mask.zero_()
    mask[1:4, 5] = True
    refresh_index(index)
    assert [entries.data_ptr() for entries in index.lists] == places
    for held, wanted in zip(index.lists, build_index(mask, 16).lists, strict=True):
        assert torch.equal(held, wanted)


def test_break_even_between_measured_densities() -> None:
    assert break_even(2.0, {1.0: 3.0, 0.1: 0.3, 0.5: 1.0}) == pytest.approx(0.75)
    assert break_even(2.0, {0.1: 2.5, 1.0: 9.0}) == 0.0
    assert break_even(2.0, {0.1: 0.3, 1.0: 1.9}) == 1.0


def test_a_measured_row_on_a_tiny_layer() -> None:
    found = measure_row("cpu", "cpu", F32, block=16, tokens=24, widths=(32, 64), densities=(0.25, 1.0), rounds=1)
    assert (found.backend, found.dtype, found.case[2:]) == ("cpu", "float32", (16, 24, 32, 64))
    assert set(found.seconds) == {"0.25", "1"} and 0.0 <= found.break_even <= 1.0
    assert speedup(found, 0.1) == found.dense_seconds / found.seconds["0.25"]
    assert efficiency(found, 0.1) == pytest.approx(0.25 * speedup(found, 0.1))
    json.dumps(found.seconds)
    assert found.host_seconds == {} and host_seconds(found, 0.1) is None


def test_host_seconds_are_kept_beside_those_of_the_device(own) -> None:
    known = replace(row(0.5), host_seconds={"dense": 0.25, "0.1": 0.75})
    TABLE.write(own, [measurement(known)])
    (found,) = TABLE.read(own)
    assert found.rows == (known,) and host_seconds(found.rows[0], 0.2) == 0.75
    entries = json.loads(own.read_text())
    del entries["measurements"][0]["rows"][0]["host_seconds"]
    own.write_text(json.dumps(entries))
    assert TABLE.read(own)[0].rows == (row(0.5),), "tables of before can be read"


def test_shapes_by_name_or_widths() -> None:
    assert parse_shape("768x3072") == ((768, 3072),) and parse_shape("gpt2-xl") == LAYERS["gpt2-xl"]
    for wrong in ("gpt5", "768", "768x", "0x8", "8x8x8", "-8x8"):
        with pytest.raises(ValueError, match="gpt2-small"):
            parse_shape(wrong)


def test_a_cache_folder_that_is_named_holds_the_table(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MEGASPARSE_CACHE", str(tmp_path))
    assert TABLE.own() == tmp_path / "break_even.json" == build.cache_folder() / "break_even.json"
