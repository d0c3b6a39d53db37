"""What the check says of wrong kernels, and of sections that hang, crash or find no time."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time

import processes
import psutil
import pytest
from commands import TOOL, check, environment, rows, states, words

from megasparse.gpu_check.context import LEFT_OUT, Context, read_rows
from megasparse.gpu_check.driver import verdict
from megasparse.gpu_check.sections import SECTIONS, choose

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

WRONG_KERNELS = """
from megasparse.kernels.block_sparse import gpu
from megasparse.kernels.hybrid_attention import gpu as attention
input_gradient, weight_gradient, calls = gpu.input_gradient, gpu.weight_gradient, []
def unsteady(*arguments):
    calls.append(1)
    return weight_gradient(*arguments) * (1 + len(calls) % 2 * 2.0**-22)
def refuse(*arguments):
    raise ValueError("no such tile")
gpu.input_gradient = lambda *arguments: input_gradient(*arguments) * 1.0001
gpu.weight_gradient = unsteady
attention.forward = refuse
"""
"""One that is off by 1e-4, one that gives other bits in every second call, and one that cannot run."""

HANG_AND_CRASH = """
import os, subprocess, sys, time
from megasparse.gpu_check import facts, numerics
def crash(context):
    context.row("copy", {"bytes": 1}, {"bytes_per_second": 1.0})
    print("the last words of facts", flush=True)
    os.abort()
def hang_here(context):
    context.row("product", {"product": "forward"}, {"error_over_bound": 0.5, "unequal_bits": 0}, right=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    print("child", child.pid, flush=True)
    time.sleep(1000)
facts.run, numerics.run = crash, hang_here
"""


@needs_triton
def test_wrong_kernels_are_status_1(tmp_path) -> None:
    done, report = check(tmp_path, "--sections", "numerics", "--minutes", "30", before=WRONG_KERNELS)
    assert done.returncode == report["status"] == 1, done.stderr
    assert "comparisons are wrong, the first: numerics: " in report["verdict"] and "WRONG" in done.stdout
    by_kernel: dict[str, list[dict]] = {}
    for _, row in rows(report):
        words = row["case"].get("product") or row["case"].get("kernel") or row["name"]
        by_kernel.setdefault(words, []).append(row)
    assert all(row["right"] for name in ("forward", "product, forward") for row in by_kernel[name])
    for row in by_kernel["input gradient"] + by_kernel["product, input gradient"]:
        assert row["right"] is False and row["numbers"]["error_over_bound"]["rehearsed"] > 1
    # By autograd it is called once more in every run, too.
    for row in by_kernel["weight gradient"] + by_kernel["product, weight gradient"] + by_kernel["autograd"]:
        assert row["right"] is False and row["numbers"]["unequal_bits"]["rehearsed"] > 0
    for row in by_kernel["attention"] + by_kernel["attention, local"]:
        assert row["right"] is False and "ValueError: no such tile" in row["note"]


def test_hanging_and_crashing_sections_are_told(tmp_path) -> None:
    output = tmp_path / "check.json"
    options = ("--sections", "facts,numerics", "--minutes", "0.5")
    command = words(output, *options, before=HANG_AND_CRASH)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with processes.Process(command, environment(tmp_path), **pipes) as process:
        # The file already holds what was found while a later section hangs.
        before = wait_for_section(output, "facts")
        assert process.poll() is None and "numerics" not in before["sections"]
        text, _ = process.communicate(timeout=processes.LIMIT_SECONDS)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert process.returncode == report["status"] == 3
    assert states(report) == {"facts": "failed", "numerics": "stopped"}
    facts, numerics = report["sections"]["facts"], report["sections"]["numerics"]
    assert facts["rows"][0]["numbers"] == {"bytes_per_second": {"rehearsed": 1.0}} and len(numerics["rows"]) == 1
    assert "the last words of facts" in "\n".join(facts["last_lines"]) and facts["last_lines"][-1] == "exit status -6"
    # Where it hung, and that it was killed with what it had started.
    assert any("in hang_here" in line for line in numerics["last_lines"]), numerics["last_lines"]
    assert numerics["last_lines"][-1] == "killed at its limit of 6 s"
    assert report["verdict"] == (
        "1 comparisons are right, but not all were made: numerics (stopped); besides: facts failed"
    )
    assert "the last words of facts" in text and "stopped" in text
    (child,) = [int(line.split()[1]) for line in numerics["last_lines"] if line.startswith("child ")]
    assert wait_for_end(child)


def wait_for_end(number: int) -> bool:
    """Whether the process ends, or has ended and nobody has asked for its status yet."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def wait_for_section(path, name: str) -> dict:
    deadline = time.monotonic() + processes.LIMIT_SECONDS
    while time.monotonic() < deadline:
        if path.exists():
            # Whole at any moment: it is replaced at once.
            report = json.loads(path.read_text(encoding="utf-8"))
            if name in report["sections"]:
                return report
        time.sleep(0.02)
    raise AssertionError("the section has not come to its end")


def test_mistakes_of_the_user(tmp_path) -> None:
    command = [sys.executable, TOOL, "--output", tmp_path / "check.json"]
    variables = {**environment(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = processes.run([*command, "--sections", "facts"], env=variables)
    assert done.returncode == 2
    assert "error: no GPU that the kernels run on" in done.stderr and "--rehearse" in done.stderr
    with pytest.raises(ValueError, match="--sections: 'speed' is unknown; must be of facts, compiling"):
        choose("facts,speed")


def test_sections_keep_their_order() -> None:
    assert [section.name for section in choose("tuning,facts")] == ["facts", "tuning"]
    assert choose(None) == SECTIONS
    expected = "facts compiling numerics components products attention training step tuning"
    assert [section.name for section in SECTIONS] == expected.split()


def test_cases_without_time_are_counted(tmp_path) -> None:
    context = Context(0.2, tmp_path / "rows", rehearse=False)
    seen = []
    for case in context.in_time(range(100), "cases"):
        seen.append(case)
        time.sleep(0.05)
    (row,) = read_rows(context.rows_file)
    assert 0 < len(seen) < 100
    assert row["name"] == LEFT_OUT and row["numbers"] == {"cases": {"measured": 100 - len(seen)}}


def test_a_broken_last_row_is_passed_over(tmp_path) -> None:
    context = Context(10, tmp_path / "rows", rehearse=True)
    context.row("copy", {}, {"bytes_per_second": float("nan")})
    with context.rows_file.open("a") as file:
        file.write('{"name": "co')
    (row,) = read_rows(context.rows_file)
    assert row["numbers"] == {"bytes_per_second": {"rehearsed": None}} and row["right"] is None


def entry(decides: bool, state: str = "done", *right: bool | None, name: str = "product") -> dict:
    made = [{"name": name, "case": {}, "right": each} for each in right]
    return {"decides": decides, "state": state, "rows": made}


@pytest.mark.parametrize(
    ("entries", "status", "words"),
    [
        ({"numerics": entry(True, "done", True, None)}, 0, "all 1 comparisons are right"),
        ({"numerics": entry(True, "done", True, False)}, 1, "1 of 2 comparisons are wrong, the first: numerics"),
        # Wrong is wrong, even where the section did not come to its end.
        ({"numerics": entry(True, "stopped", False)}, 1, "1 of 1"),
        ({"numerics": entry(True, "not started")}, 3, "numerics (not started)"),
        ({"numerics": entry(True, "done", None, name=LEFT_OUT)}, 3, "numerics (no time for all)"),
        ({"components": entry(True, "unavailable")}, 0, "besides: components unavailable"),
        ({"training": entry(False, "done", False)}, 0, "besides: 1 comparisons of training wrong"),
        ({"products": entry(False, "failed")}, 0, "besides: products failed"),
    ],
)
def test_the_verdict(entries, status, words) -> None:
    found, sentence = verdict(entries)
    assert found == status and words in sentence
