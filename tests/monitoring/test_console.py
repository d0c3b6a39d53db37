"""What rank 0 prints: plain lines away from a terminal, a live bar on one, nothing on other ranks."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from megasparse.monitoring.console import (
    Progress,
    QuietProgress,
    make_console,
    print_plan,
    print_summary,
    print_warnings,
    quiet,
    sparkline,
)
from megasparse.utils import format as units

PLAN = {
    "run": "mst-small",
    "parameters": {"total": 124_439_808, "sparsifiable": 84_934_656, "active_at_min_density": 47_998_000},
    "tokens": {"total": 65_536_000, "per_step": 32768},
    "steps": 2000,
    "schedule": {
        "phases": [
            {"name": "warm_up", "start_step": 0, "end_step": 200},
            {"name": "ultra_sparse", "start_step": 200, "end_step": 1400},
            {"name": "restoration", "start_step": 1400, "end_step": 1700},
            {"name": "dense", "start_step": 1700, "end_step": 2000},
        ],
        "mean_density": 0.323,
        "min_density": 0.1,
        "curve": [1.0, 0.4, *[0.1] * 12, 0.6, 1.0, 1.0],
    },
    "documents": "not masked",
    "communication": {"data_parallel": 2**20, "tensor_parallel": 2**10, "topology_step": 2**12},
    "flops": {"dense": 4.0e15, "algorithmic": 1.1e15, "ratio": 0.275},
    "memory": {"weights": 2**30, "masks": 2**20, "gradients": 2**31, "optimizer": 3 * 2**30, "total": 13 * 2**29},
    "parallel": {
        "world_size": 8,
        "data_parallel_size": 4,
        "tensor_parallel_size": 2,
        "zero_stage": 1,
        "micro_batch_size": 4,
        "accumulation_steps": 2,
    },
    "kernels": {
        "device": "cpu",
        "block_sparse": [
            {
                "layer": "mlp.up",
                "count": 12,
                "in": 768,
                "out": 3072,
                "tokens": 2048,
                "block_size": 64,
                "density": 0.1,
                "kernel": "cpu",
                "break_even": 0.82,
            },
            {
                "layer": "head",
                "count": 1,
                "in": 768,
                "out": 512,
                "tokens": 2048,
                "block_size": 1,
                "density": 0.2,
                "kernel": "dense",
                "break_even": None,
            },
        ],
        "dense": [
            {"layer": "mlp.up", "count": 2, "in": 64, "out": 256, "tokens": 2048, "kernel": "onednn"},
            {"layer": "mlp.down", "count": 2, "in": 256, "out": 64, "tokens": 2048, "kernel": "torch"},
            {"layer": "head", "count": 1, "in": 64, "out": 512, "tokens": 2048, "kernel": "onednn"},
        ],
        "hybrid_attention": "reference",
        "elementwise": "torch",
        "optimizer": "torch",
        "loss": "torch",
    },  # fmt: skip
    "warnings": ["hybrid_attention: [bold]slow[/bold] reference"],
}

SUMMARY = {
    "run": "mst-small",
    "steps": 1300,
    "tokens": 42_598_400,
    "loss": 2.0125,
    "val_loss": 1.9876,
    "best_val_loss": 1.9543,
    "final_density": 0.1,
    "flops_dense": 2.6e15,
    "flops_algorithmic": 5.2e14,
    "flops_executed": 7.8e14,
    "seconds": 415.0,
    "seconds_by_part": {"forward": 100.0, "backward": 250.0},
    "hardware": "2 x CPU",
    "finished": False,
    "reason": "signal USR1",
}

NUMBERS = {"loss": 2.34567, "density": 0.123, "phase": "ultra_sparse", "pattern": "sparse", "tokens_per_s": 12345.0}


def plain_console(encoding: str = "utf-8", width: int = 100) -> tuple[Console, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=file, width=width, force_terminal=False), file


def written(file: io.TextIOWrapper) -> str:
    return file.buffer.getvalue().decode(file.encoding)


def test_each_update_is_one_plain_line_with_all_values() -> None:
    console, file = plain_console(width=40)
    with Progress(4000, console=console) as progress:
        progress.update(10, **NUMBERS)
        progress.update(1000, **NUMBERS, val_loss=2.2222)
    lines = written(file).splitlines()
    assert len(lines) == 2
    for value in ("2.3457", "12.3 %", "ultra-sparse", "sparse", "12.3 K tokens/s", "left"):
        assert value in lines[0] and value in lines[1]
    assert "   10 of 4,000" in lines[0] and "1,000 of 4,000" in lines[1]
    assert "validation" not in lines[0] and "validation 2.2222" in lines[1]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", written(file))


def test_environment_cannot_force_control_codes_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    monkeypatch.setattr("sys.stdout", file)
    with Progress(10, console=make_console()) as progress:
        progress.update(1, **NUMBERS)
        print_warnings(["careful"], progress.console)
    assert "\x1b" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 2


def test_terminal_has_a_bar_and_no_plain_lines() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=160, _environ={"TERM": "xterm-256color"})
    with Progress(100, console=console) as progress:
        progress.message("a message [not markup]")
        progress.update(40, **NUMBERS, val_loss=2.5)
        progress.update(100, **{**NUMBERS, "pattern": "[red]x[/oops]"})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "\x1b[" in file.getvalue() and "━" in text
    assert "a message [not markup]" in text and "step 40: validation loss 2.5000" in text
    assert "40/100" in text and "100/100" in text and "2.3457" in text and "[red]x[/oops]" in text
    assert "step  40 of 100" not in text


def test_a_narrow_terminal_loses_no_number() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm-256color"})
    with Progress(100_000, start_step=400, console=console) as progress:
        progress.update(99_000, **NUMBERS)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    for value in ("99,000/100,000", "2.3457", "12.3 %", "ultra-sparse", "12.3 K tok/s", "left"):
        assert value in text, value


def test_messages_and_warnings_are_literal_and_free_of_control_codes() -> None:
    console, file = plain_console()
    with Progress(5, console=console) as progress:
        progress.message("loaded [bold]x[/bold] \x1b[2J from 'a'")
    print_warnings(["slow " + "word " * 60], console)
    lines = written(file).splitlines()
    assert lines[0] == "loaded [bold]x[/bold] ?[2J from 'a'"
    assert len(lines) == 2 and lines[1].startswith("warning: slow ")


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 120.0])
    monkeypatch.setattr("megasparse.monitoring.console.time.monotonic", lambda: next(clock))
    console, file = plain_console()
    with Progress(1000, start_step=900, console=console) as progress:
        progress.update(910, **NUMBERS)
    # 10 steps took 20 seconds, so 90 more take 180.
    assert "3 min 00 s left" in written(file)


def test_quiet_has_the_same_methods_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    public = [name for name in vars(Progress) if not name.startswith("_")]
    assert sorted(public) == ["message", "update"]
    assert all(hasattr(QuietProgress, name) for name in public)
    with quiet() as progress:
        progress.update(1, **NUMBERS)
        progress.message("m")
    assert capsys.readouterr() == ("", "")


def test_quiet_does_not_swallow_exceptions() -> None:
    with pytest.raises(KeyError), quiet():
        raise KeyError("x")


def test_plan_shows_every_part_with_units() -> None:
    console, file = plain_console(width=140)
    print_plan(PLAN, console)
    text = written(file)
    for value in (
        "mst-small", "124 M", "84.9 M", "48.0 M", "2,000 steps", "32,768 tokens", "65.5 M tokens",
        "warm-up: steps 0 to 200", "dense: steps 1,700 to 2,000", "mean 32.3 %", "lowest 10 %",
        "1.10 PFLOPs", "4.00 PFLOPs", "27.5 %", "3.64x", "6.50 GiB", "weights 1.00 GiB", "masks 1.00 MiB",
        "8 ranks", "4 data x 2 tensor", "ZeRO stage 1", "micro-batch 4 x 2", "device: cpu",
        "12 x mlp.up 768 -> 3072, blocks of 64: cpu at density 10 %, dense above 82 %",
        "1 x head 768 -> 512, single weights: dense at density 20 %  ", "hybrid attention: reference",
        "up to 4.00 KiB a topology update", "warning: hybrid_attention: [bold]slow[/bold] reference", "█", "▁",
    ):  # fmt: skip
        assert value in text, value
    assert "\x1b" not in text


def test_plan_needs_no_unicode() -> None:
    console, file = plain_console(encoding="ascii")
    print_plan(PLAN, console)
    assert "mean 32.3 %" in written(file)


def test_summary_shows_the_outcome() -> None:
    console, file = plain_console(width=140)
    print_summary(SUMMARY, console)
    text = written(file)
    for value in (
        "stopped early after 1,300 steps: signal USR1", "1.9876", "1.9543", "2.0125", "10 %", "2.60 PFLOPs",
        "520 TFLOPs, 20 % of dense", "780 TFLOPs, 30 % of dense", "6 min 55 s", "42.6 M tokens", "103 K tokens/s",
        "backward 4 min 10 s", "2 x CPU",
    ):  # fmt: skip
        assert value in text, value


def test_sparkline_spans_its_characters() -> None:
    assert sparkline([0.0, 0.49, 0.5, 1.0]) == "▁▄▅█"
    assert sparkline([0.0, 1.0], blocks=False) == ".@"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_count(999.4), "999"),
        (units.format_count(999.6), "1.00 K"),
        (units.format_count(124_439_808), "124 M"),
        (units.format_count(999_600), "1.00 M"),
        (units.format_flops(3.2e15), "3.20 PFLOPs"),
        (units.format_bytes(1536), "1.50 KiB"),
        (units.format_share(0.274), "27.4 %"),
        (units.format_share(1.0), "100 %"),
        (units.format_share(0.0001), "0.01 %"),
        (units.format_seconds(0), "0 s"),
        (units.format_seconds(0.0123), "12.3 ms"),
        (units.format_seconds(59.97), "1 min 00 s"),
        (units.format_seconds(3599.7), "1 h 00 min"),
        (units.format_seconds(90_000), "1 d 01 h"),
        (units.format_count(float("nan")), units.MISSING),
        (units.format_count(None), units.MISSING),
        (units.format_count(True), units.MISSING),
    ],
)
def test_units(text: str, expected: str) -> None:
    assert text == expected
