"""What a run measures where it starts for the first time on a machine, with a timer that measures nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.kernels.block_sparse import break_even, cpu
from megasparse.kernels.common import tables
from megasparse.kernels.common.tables import Machine, Measurement
from megasparse.kernels.dense_products import onednn
from megasparse.kernels.dense_products.table import TABLE as DENSE_TABLE
from megasparse.kernels.dense_products.table import Row as DenseRow
from megasparse.kernels.hybrid_attention import cpu as attention_cpu
from megasparse.kernels.hybrid_attention.break_even import TABLE as ATTENTION_TABLE
from megasparse.kernels.hybrid_attention.break_even import Row as AttentionRow
from megasparse.training.plan import make_plan
from megasparse.tuning import first_start, kernel_tuning
from megasparse.tuning.first_start import (
    AttentionCase,
    DenseCase,
    LayerCase,
    Meter,
    affordable_tokens,
    fit_tables,
    missing,
)
from megasparse.tuning.first_start import rounds_within as rounds
from megasparse.utils.dtypes import dtype_name

HERE = "Forged Processor 9000"
LAYERS = [(64, 64), (64, 128), (64, 192), (128, 64)]
SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=128",
    "model.seq_length=256",
    "model.vocab_size=320",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    "sparsity.block_size=16",
    "attention.stride=16",
    # Dense products have tests of their own at the end.
    "kernels.dense=torch",
]


class FakeTimer:
    """Answers at once; its clock goes on by what the work would take."""

    def __init__(self, *, seconds_a_token: float = 1e-6, break_even: float = 0.9, dense: float = 2.0) -> None:
        self.now, self.asked = 0.0, []
        self.seconds_a_token, self.limit, self.dense = seconds_a_token, break_even, dense
        self.fails_at: tuple[int, BaseException] | None = None

    @property
    def meter(self) -> Meter:
        return Meter(self.layer, self.expected, self.patterns, self.dense_products, lambda: self.now)

    def layer(self, backend: str, device: str, dtype: torch.dtype, *, tokens, rounds, block, widths, **_) -> Any:
        self._count(("layer", widths, tokens, rounds))
        self.now += (rounds + 1) * tokens * self.seconds_a_token
        torch.rand(3)
        return break_even.Row(backend, dtype_name(dtype), block, tokens, *widths, self.limit, 1.0, {"1": 1.0})

    def expected(self, backend: str, dtype: torch.dtype, *, block, widths, densities) -> Callable[[int], float]:
        def once(tokens: int) -> float:
            self.now += tokens * self.seconds_a_token
            return tokens * self.seconds_a_token

        return once

    def patterns(
        self, kernel: str, device: str, dtype: torch.dtype, *, stride, head_dim, patterns, lengths, rounds, fastest
    ):
        (length,) = lengths
        self._count(("attention", patterns, length, rounds))
        self.now += (rounds + 1) * length * self.seconds_a_token
        seconds = {str(length): {"kernel": 1.0, "mask": 3.0, "dense": self.dense}}
        return [AttentionRow(kernel, dtype_name(dtype), name, stride, head_dim, 4, seconds) for name in patterns]

    def dense_products(self, dtype: torch.dtype, *, tokens, widths, rounds) -> DenseRow:
        self._count(("dense", widths, tokens))
        self.now += (rounds + 1) * tokens * self.seconds_a_token
        return DenseRow(dtype_name(dtype), tokens, *widths, {"torch": 2.0, "onednn": 1.0 if widths[0] == 64 else 3.0})

    def of(self, kind: str) -> list[tuple]:
        return [words[1:] for words in self.asked if words[0] == kind]

    def _count(self, words: tuple) -> None:
        self.asked.append(words)
        if self.fails_at is not None and len(self.asked) == self.fails_at[0]:
            raise self.fails_at[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder on a processor that nobody has measured; kernels that need not be built."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MEGASPARSE_CACHE", str(folder))
    monkeypatch.setattr(tables, "hardware_name", lambda device: HERE if device == "cpu" else "")
    monkeypatch.setattr(tables, "hardware_model", lambda device: "6.1")
    for module in (cpu, attention_cpu):
        monkeypatch.setattr(module, "no_compiler", lambda: None)
        monkeypatch.setattr(module, "build_failure", lambda source: None)
    tables.forget()
    yield folder
    tables.forget()


def load(*overrides: str) -> RunConfig:
    return load_config([], [*SETTINGS, *overrides])


def fit(timer: FakeTimer, *overrides: str) -> tuple[bool, list[str], list[str]]:
    """Whether tables may have changed, what was told and what was warned of."""
    told: list[str] = []
    warned: list[str] = []
    config = load(*overrides)
    changed = fit_tables(config, make_plan(config, 1, "cpu"), tell=told.append, warn=warned.append, meter=timer.meter)
    return changed, told, warned


def plan_warnings(*overrides: str) -> list[str]:
    return [words for words in make_plan(load(*overrides), 1, "cpu")["warnings"] if words.startswith("kernels.tune")]


def limit(precision: torch.dtype = torch.float32, tokens: int = 512) -> float:
    return break_even.measured("cpu", "cpu", precision, 16, tokens, (64, 192))


def test_the_layers_and_patterns_of_the_run_are_measured_and_nothing_else() -> None:
    timer = FakeTimer()
    changed, told, warned = fit(timer, "sparsity.head=true", "attention.overrides=[{heads: 0.5, pattern: local}]")
    assert changed and not warned
    head = make_plan(load("sparsity.head=true"), 1, "cpu")["kernels"]["block_sparse"][-1]
    wanted = [*((widths, 512) for widths in LAYERS), ((64, head["out"]), head["tokens"])]
    assert head["layer"] == "head" and sorted(case[:2] for case in timer.of("layer")) == sorted(wanted)
    assert {names for names, *_ in timer.of("attention")} == {("full",), ("local", "sparse")}
    assert {length for _, length, _ in timer.of("attention")} == {128, 256}
    assert HERE in told[0] and f"threads: {torch.get_num_threads()}" in told[0] and "kept in" in told[-1]


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (["kernels.break_even=0.5"], {"attention"}),
        (["kernels.block_sparse=dense"], {"attention"}),
        (["sparsity.block_size=1"], {"attention"}),
        (["kernels.hybrid_attention=tiled"], {"layer"}),
        (["kernels.hybrid_attention=tiled", "sparsity.algorithm=dense"], set()),
        # Full attention is left, which every run has; in short sequences it is torch's.
        (["attention.phases={}"], {"layer", "attention"}),
        (["attention.phases={}", "model.seq_length=127"], {"layer"}),
        (["attention.dense_fallback=[sparse]"], {"layer", "attention"}),
        (["sparsity.algorithm=dense"], {"attention"}),
    ],
)
def test_what_no_table_decides_is_not_measured(words, kinds) -> None:
    timer = FakeTimer()
    assert fit(timer, *words)[0] == bool(kinds)
    assert {kind for kind, *_ in timer.asked} == kinds


def test_what_was_measured_is_kept_and_decides(cache) -> None:
    assert limit() != 0.875, "of the shipped table"
    fit(FakeTimer(break_even=0.875))
    assert limit() == 0.875
    (measurement,) = break_even.TABLE.read(cache / "break_even.json")
    assert measurement.machine == Machine(HERE, "6.1", "cpu", torch.get_num_threads())
    rows = make_plan(load(), 1, "cpu")["kernels"]["block_sparse"]
    assert [row["break_even"] for row in rows] == [0.875] * 4
    again = FakeTimer()
    assert fit(again) == (False, [], []) and not again.asked, "a second start measures nothing"
    tables.forget()
    assert fit(again) == (False, [], []), "nor does another process"


def test_threads_precision_and_model_of_the_processor_are_part_of_the_key(monkeypatch) -> None:
    fit(FakeTimer(break_even=0.875))
    for case in ("threads", "precision", "model"):
        timer, words = FakeTimer(break_even=0.625), []
        with monkeypatch.context() as patch:
            if case == "threads":
                torch.set_num_threads(torch.get_num_threads() + 1)
            elif case == "precision":
                words = ["train.precision=bf16"]
            else:
                patch.setattr(tables, "hardware_model", lambda device: "6.2")
            assert fit(timer, *words)[0] and len(timer.of("layer")) == len(LAYERS), case
            assert limit(torch.bfloat16 if words else torch.float32) == 0.625
            torch.set_num_threads(1)
        assert limit() == 0.875


def test_what_other_kernels_or_another_torch_have_measured_is_measured_anew(cache, monkeypatch) -> None:
    fit(FakeTimer(break_even=0.875))
    for versions in ({"kernels": "new"}, {"kernels": "new", "torch": "9"}):
        monkeypatch.setattr(kernel_tuning, "code_versions", lambda found=versions: found)
        monkeypatch.setattr(first_start, "code_versions", lambda found=versions: found)
        assert limit() == 0.875 and not plan_warnings(), "until then it is the best that is known"
        timer = FakeTimer(break_even=0.875)
        assert fit(timer)[0] and len(timer.of("layer")) == len(LAYERS) and timer.of("attention")
        assert not fit(FakeTimer())[0]
    assert len(break_even.TABLE.read(cache / "break_even.json")) == 1, "in place of what was there"


def test_a_table_of_another_machine_is_told(monkeypatch) -> None:
    shipped = break_even.TABLE.read(break_even.SHIPPED)[0].hardware
    for mode in ("auto", "never"):
        (warning,) = plan_warnings(f"kernels.tune={mode}")
        assert HERE in warning and shipped in warning and warning.startswith(f"kernels.tune {mode}: ")
        assert "sparse layers" in warning and "attention" in warning
    fit(FakeTimer())
    assert not plan_warnings() and not plan_warnings("kernels.tune=never")
    monkeypatch.setattr(tables, "hardware_name", lambda device: "Yet Another 1")
    (warning,) = plan_warnings("kernels.tune=never")
    assert "Yet Another 1" in warning and shipped in warning and HERE not in warning
    forced = ("kernels.block_sparse=dense", "kernels.hybrid_attention=reference")
    assert not plan_warnings(*forced), "no table decides"


def test_measurements_without_a_model_count_for_their_name() -> None:
    old = Machine("x", "", "cpu", 2)
    assert old.counts_for(Machine("x", "6.1", "cpu", 2)) and not old.counts_for(Machine("y", "", "cpu", 2))
    assert not old.counts_for(Machine("x", "", "cpu", 1)) and not old.counts_for(Machine("x", "", "cuda", 2))
    gpu = Machine("g", "", "cuda", 2)
    assert gpu.counts_for(Machine("g", "", "cuda", 16)), "threads of the host have no part in a GPU's work"


def test_plans_measure_nothing(cache, monkeypatch) -> None:
    monkeypatch.setattr(first_start, "measure", lambda *words: pytest.fail("a plan measures nothing"))
    make_plan(load("attention.dense_fallback=true"), 1, "cpu")
    assert not cache.exists()


def test_dense_fallback_follows_what_was_measured() -> None:
    fit(FakeTimer(dense=0.5), "attention.dense_fallback=true")
    told = make_plan(load("attention.dense_fallback=true"), 1, "cpu")["warnings"]
    assert "attention.dense_fallback: full attention runs in place of sparse" in told
    assert ATTENTION_TABLE.own_rows("cpu")[0].lengths == [128, 256]


def test_lengths_of_other_runs_are_kept() -> None:
    fit(FakeTimer(dense=0.5))
    fit(FakeTimer(dense=0.5), "model.seq_length=512")
    (row,) = (row for row in ATTENTION_TABLE.own_rows("cpu") if row.pattern == "sparse")
    assert row.lengths == [128, 256, 512]
    again = FakeTimer()
    assert not fit(again)[0] and not fit(again, "model.seq_length=512")[0]


def test_a_pattern_that_won_at_a_shorter_length_is_settled() -> None:
    """Its work grows slower; so sequences too long to be measured in time are not tried at every start."""
    slow = FakeTimer(seconds_a_token=0.004)
    fit(slow, "kernels.block_sparse=dense", "model.seq_length=2048")
    assert max(length for _, length, _ in slow.of("attention")) < 2048
    assert not fit(FakeTimer(), "kernels.block_sparse=dense", "model.seq_length=2048")[0]
    case = AttentionCase("cpu", torch.float32, ("sparse",), 16, 16, 2048)
    row = AttentionRow("cpu", "float32", "sparse", 16, 16, 4, {"128": {"kernel": 2.0, "mask": 3.0, "dense": 1.0}})
    assert not case.is_known([row])
    # Under `full` it does not: what won at 128 tokens tells nothing of 2,048.
    case = AttentionCase("cpu", torch.float32, ("full",), 16, 16, 2048)
    for length, each, known in ((128, 1e-3, False), (128, 1.0, True), (512, 1e-3, True), (2048, 1e-3, True)):
        seconds = {str(length): {"kernel": each, "mask": 2 * each, "dense": 2 * each}}
        assert case.is_known([replace(row, pattern="full", stride=64, seconds=seconds)]) == known, (length, each)


def test_a_slow_machine_measures_with_fewer_tokens_in_the_same_time() -> None:
    timer = FakeTimer(seconds_a_token=8e-3)
    fit(timer, "kernels.hybrid_attention=reference")
    assert all(tokens < 512 for _, tokens, _ in timer.of("layer"))
    assert timer.now <= 1.2 * first_start.BUDGET_SECONDS, "the search for a number of tokens has its part"
    assert limit() == 0.9, "they count for the tokens of the run"
    assert not fit(FakeTimer(), "kernels.hybrid_attention=reference")[0]
    (row, *_) = break_even.TABLE.own_rows("cpu")
    assert row.counts_for[0] == 512 != row.tokens


def test_no_fewer_tokens_are_measured_than_tell_something() -> None:
    case = LayerCase("cpu", torch.float32, 16, 512, (64, 64))
    for seconds_a_token, wanted in ((4e-3, 256), (7e-3, 32)):
        timer = FakeTimer(seconds_a_token=seconds_a_token)
        case.measure("cpu", 0.1, timer.meter)
        assert timer.of("layer") == [((64, 64), wanted, 3)]


def test_a_pattern_that_has_not_won_is_measured_at_the_length_of_the_run() -> None:
    case = AttentionCase("cpu", torch.float32, ("sparse",), 16, 16, 1024)
    for dense, longest in ((2.0, 128), (0.5, 1024)):
        timer = FakeTimer(seconds_a_token=2e-6, dense=dense)
        rows = case.measure("cpu", 3e-3, timer.meter)
        assert rows[0].lengths[-1] == longest and case.is_known(rows), dense


def test_a_wide_layer_is_measured_on_a_part_of_its_width() -> None:
    case = LayerCase("cpu", torch.float32, 48, 512, (96, 9600))
    timer = FakeTimer()
    (row,) = case.measure("cpu", 5.0, timer.meter)
    assert (row.in_features, row.out_features, row.counts_for) == (96, 4080, (512, 96, 9600)) and case.is_known([row])


def test_what_the_budget_leaves_out_is_measured_by_the_next_start() -> None:
    timer = FakeTimer(seconds_a_token=0.1)
    _, _, warned = fit(timer, "kernels.hybrid_attention=reference")
    done = len(timer.of("layer"))
    assert 0 < done < len(LAYERS) and f"{len(LAYERS) - done} of {len(LAYERS)}" in warned[0]
    again = FakeTimer()
    fit(again, "kernels.hybrid_attention=reference")
    assert len(again.of("layer")) == len(LAYERS) - done


def test_how_many_tokens_and_rounds_are_affordable() -> None:
    assert affordable_tokens(1000, 1.0, lambda tokens: tokens / 1e6) == (1000, pytest.approx(1e-3))
    assert affordable_tokens(1000, 1.0, lambda tokens: tokens / 300) == (256, pytest.approx(256 / 300))
    assert affordable_tokens(1000, 1.0, lambda tokens: 60.0)[0] == 32
    assert affordable_tokens(7, 1.0, lambda tokens: 0.1) == (7, 0.1)
    hiccups = iter([9.0, 0.01, *[0.01] * 9])
    assert affordable_tokens(1000, 1.0, lambda tokens: next(hiccups))[0] == 1000
    assert [rounds(seconds, each) for seconds, each in ((9, 1e-4), (9, 0.1), (0.5, 0.1), (9, 5))] == [15, 9, 4, 3]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), MemoryError()])
def test_a_measurement_that_fails_or_is_interrupted_is_told_and_what_is_done_is_kept(error) -> None:
    timer = FakeTimer()
    timer.fails_at = 3, error
    changed, _, warned = fit(timer, "kernels.hybrid_attention=reference")
    assert changed and len(warned) == 1
    words = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or "MemoryError"
    assert words in warned[0] and warned[0].startswith("kernels.tune: ")
    again = FakeTimer()
    fit(again, "kernels.hybrid_attention=reference")
    assert len(again.of("layer")) == len(LAYERS) - 2, "the next start goes on"
    assert not missing(load(), make_plan(load("kernels.hybrid_attention=reference"), 1, "cpu"))[2:]


def test_an_interrupted_write_leaves_the_table_of_before(cache, monkeypatch) -> None:
    fit(FakeTimer(break_even=0.875))
    before = (cache / "break_even.json").read_bytes()

    def full(*words: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(words[-1]))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(Path, "replace", full)
        patch.setattr(os, "rename", full)
        patch.setattr(Path, "rename", full)
        _, _, warned = fit(FakeTimer(), "train.precision=bf16")
    assert "No space left on device" in warned[0]
    assert (cache / "break_even.json").read_bytes() == before and limit() == 0.875


def test_a_file_that_is_no_table_is_left_alone(cache) -> None:
    cache.mkdir()
    (cache / "break_even.json").write_text("{")
    timer = FakeTimer()
    _, _, warned = fit(timer)
    assert not timer.asked and "break_even.json: no table of break-even measurements" in warned[0]
    assert (cache / "break_even.json").read_text() == "{"


def test_where_nothing_can_be_kept_nothing_is_measured(cache, monkeypatch) -> None:
    timer = FakeTimer()
    cache.write_text("")  # a file in place of the folder
    _, _, warned = fit(timer)
    assert not timer.asked and str(cache) in warned[0]
    cache.unlink()

    def refused(*words: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache))

    monkeypatch.setattr(first_start.FileLock, "acquire", refused)
    _, _, warned = fit(timer)
    assert not timer.asked and f"{cache}: Permission denied" in warned[0]
    assert plan_warnings(), "and the plan names the table that is used"


def test_what_another_run_has_measured_meanwhile_is_taken(cache, monkeypatch) -> None:
    lock = first_start._alone

    @contextmanager
    def after_another(tell: Any) -> Iterator[None]:
        monkeypatch.setattr(first_start, "_alone", lock)
        fit(FakeTimer(break_even=0.875))
        with lock(tell):
            yield

    monkeypatch.setattr(first_start, "_alone", after_another)
    timer = FakeTimer()
    assert fit(timer) == (True, [], []) and not timer.asked and limit() == 0.875


def test_random_numbers_stay_those_of_the_run() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(5)
    fit(FakeTimer())
    assert torch.equal(torch.rand(4), wanted)


def test_of_rows_that_are_equally_near_the_newest_counts(cache) -> None:
    row = break_even.Row("cpu", "float32", 16, 512, 64, 192, 0.25, 1.0, {"1": 1.0})
    rows = [row, replace(row, tokens=256, break_even=0.5, counts_for=(512, 64, 192))]
    here = [Measurement(HERE, "cpu", torch.get_num_threads(), (each,), {}) for each in rows]
    break_even.TABLE.write(cache / "break_even.json", here)
    assert limit() == 0.5


def test_a_row_that_counts_for_something_odd_is_no_row(cache) -> None:
    row = break_even.Row("cpu", "float32", 16, 512, 64, 192, 0.25, 1.0, {"1": 1.0}, counts_for=(512, 64))
    break_even.TABLE.write(cache / "break_even.json", [Measurement(HERE, "cpu", 1, (row,), {})])
    with pytest.raises(ValueError, match="counts_for: .*tokens, in and out"):
        break_even.TABLE.read(cache / "break_even.json")


DENSE = [*LAYERS, (64, 384)]
"""With the head, of which an entry of the vocabulary is 64 wide."""


def planned_dense(*overrides: str) -> dict[str, str]:
    rows = make_plan(load("kernels.dense=auto", *overrides), 1, "cpu")["kernels"]["dense"]
    return {row["layer"]: row["kernel"] for row in rows}


def test_dense_products_are_measured_and_decide(cache, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "why_not", lambda device, dtype: None if dtype == torch.float32 else "dtype")
    assert set(planned_dense().values()) == {"torch"}, "nobody has measured"
    timer = FakeTimer()
    assert fit(timer, "kernels.dense=auto", "sparsity.algorithm=dense", "model.vocab_size=384")[0]
    assert sorted(timer.of("dense")) == sorted((widths, 512) for widths in DENSE) and not timer.of("layer")
    expected = {"attention.qkv": "onednn", "mlp.up": "onednn", "mlp.down": "torch", "head": "onednn"}
    assert planned_dense().items() >= expected.items()
    assert set(planned_dense("kernels.dense=torch").values()) == set(planned_dense("train.precision=bf16").values())
    assert not fit(FakeTimer(), "kernels.dense=auto", "sparsity.algorithm=dense", "model.vocab_size=384")[0]
    (measurement,) = DENSE_TABLE.read(cache / "dense_products.json")
    assert measurement.machine == Machine(HERE, "6.1", "cpu", torch.get_num_threads())
    monkeypatch.setattr(tables, "hardware_name", lambda device: "Yet Another 1")
    assert set(planned_dense().values()) == {"torch"}, "measurements of another machine count for nothing"


def test_a_table_of_dense_products_that_cannot_be_read_is_told(cache, monkeypatch) -> None:
    monkeypatch.setattr(onednn, "why_not", lambda device, dtype: None if device == "cpu" else "device")
    cache.mkdir()
    (cache / "dense_products.json").write_text("{")
    config = load("kernels.dense=auto")
    assert sum("dense_products.json: no table" in words for words in make_plan(config, 1, "cpu")["warnings"]) == 1
    assert not any("dense_products" in words for words in make_plan(config, 1, "cuda")["warnings"])
    _, _, (warned,) = fit(FakeTimer(), "kernels.dense=auto")
    assert "dense_products.json: no table" in warned and (cache / "dense_products.json").read_text() == "{"


def test_large_dense_products_are_measured_on_a_part() -> None:
    for case, tokens, widths in (
        (DenseCase(torch.float32, 8192, (256, 50304)), 512, (256, 4096)),
        (DenseCase(torch.float32, 8192, (8192, 8192)), 256, (4096, 4096)),
        (DenseCase(torch.float32, 40, (64, 192)), 40, (64, 192)),
    ):
        timer = FakeTimer()
        (row,) = case.measure("cpu", 4.0, timer.meter)
        assert timer.of("dense") == [(widths, tokens)] and case.is_known([row])
        assert row.counts_for == (() if tokens == case.tokens else (case.tokens, *case.widths))
