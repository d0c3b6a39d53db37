"""Parts of the check that a rehearsal cannot show: what is said of a GPU's clock, and of training that goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from itertools import pairwise
from types import SimpleNamespace

import processes
import pytest
import torch
from commands import ROOT

from megasparse.gpu_check import products, training
from megasparse.gpu_check.context import Context, read_rows
from megasparse.gpu_check.facts import ceiling, dense_rate, layers
from megasparse.gpu_check.product_numerics import bounded, excess, unequal
from megasparse.gpu_check.timing import DeviceClock
from megasparse.gpu_check.training import STEPS, Job
from megasparse.kernels.block_sparse.tiles import FORWARD


class FakeEvent:
    """Says that all between two events took 6 ms."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return 6.0


def test_device_seconds_are_those_of_one_call(monkeypatch) -> None:
    slept, calls, rounds = [], [], []
    fake = SimpleNamespace(Event=FakeEvent, synchronize=lambda: rounds.append(len(calls)), _sleep=slept.append)
    monkeypatch.setattr(torch, "cuda", fake)
    times = DeviceClock().times(lambda: calls.append(1))
    # Two to warm up, one to estimate, then rounds of as many calls as are queued at once.
    assert [b - a for a, b in pairwise(rounds[1:])] == [20, 20, 20]
    assert times.device == pytest.approx(6e-3 / 20) and 0 < times.host < 1e-3
    # The device sleeps at least 0.1 ms, 2e5 cycles of 2 GHz, before each.
    assert len(slept) == 3 and all(cycles >= 1.9e5 for cycles in slept)


def test_earlier_rows_are_found(tmp_path) -> None:
    layer = layers(rehearse=False)[0]
    case = {"model": layer[0], "in": layer[1][0], "out": layer[1][1], "tokens": layer[2], "product": FORWARD}
    rows = [
        {"name": "copy", "case": {}, "numbers": {"bytes_per_second": {"measured": 3e12}}},
        {"name": "l2", "case": {}, "numbers": {"bytes_per_second": {"measured": 6e12}}},
        {"name": "cublas", "case": case, "numbers": {"flops_per_second": {"measured": 8e14}}},
    ]
    context = Context(1.0, tmp_path / "rows", rehearse=False, earlier={"facts": rows})
    assert dense_rate(context, layer, FORWARD) == 8e14 and ceiling(context, "l2") == 6e12
    assert dense_rate(context, layer, "weight gradient") is None
    assert ceiling(Context(1.0, tmp_path / "rows"), "copy") is None


def test_the_cap_is_that_of_the_traffic(tmp_path) -> None:
    """16 x 32 -> 32 in blocks of 16 at density 1, in float32: written down by hand."""
    numbers = {"copy": 1e9, "l2": 1e9}
    rows = [{"name": n, "case": {}, "numbers": {"bytes_per_second": {"rehearsed": v}}} for n, v in numbers.items()]
    context = Context(1.0, tmp_path / "rows", rehearse=True, earlier={"facts": rows})
    made = products.SparseProducts(context, ("tiny", (32, 32), 16), 1.0)
    assert made.useful_flops == 2 * 16 * 32 * 32
    assert made.bytes_once(FORWARD) == 4 * (16 * 32 + 16 * 32 + 32 * 32)
    # Each of the 4 blocks reads 16 rows of x and itself once: as much as once over twice x.
    tile_bytes = 4 * 4 * (16 * 16 + 16 * 16)
    assert made.cap(FORWARD, dense=1e30) == pytest.approx(0.0, abs=1e-9)
    ideal = made.useful_flops / 1e9
    assert made.cap(FORWARD, dense=1e9) == pytest.approx(ideal / max(ideal, tile_bytes / 1e9, 8192 / 1e9))
    assert made.cap(FORWARD, dense=1e10) == pytest.approx(0.1 * ideal / (8192 / 1e9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bounds_hold_for_a_rounded_product_and_for_no_other(dtype) -> None:
    a, b = torch.randn(40, 300).to(dtype), torch.randn(300, 24).to(dtype)
    expected, bound = bounded(a.double(), b.double(), dtype)
    right = (a.float() @ b.float()).to(dtype)
    assert excess(right, expected, bound)["error_over_bound"] <= 1
    # One summand too few.
    wrong = (a[:, 1:].float() @ b[1:].float()).to(dtype)
    assert excess(wrong, expected, bound)["error_over_bound"] > 1
    right[3, 4] = torch.nan
    assert excess(right, expected, bound)["error_over_bound"] != excess(right, expected, bound)["error_over_bound"]
    assert unequal(right, right) == {"unequal_bits": 1.0}
    # Nothing is allowed where nothing can be: outside of active blocks.
    zero = torch.zeros(2, 2)
    assert excess(zero + 1e-30, zero.double(), zero.double())["error_over_bound"] > 1
    assert excess(zero, zero.double(), zero.double())["error_over_bound"] == 0


LOSSES = [4.0] * STEPS


@pytest.mark.parametrize(
    ("job", "found", "right"),
    [
        (Job("fp32", 3, "dense"), {"losses": LOSSES, "resumed": True}, [True, True]),
        (Job("fp32", 0, "dense"), {"losses": LOSSES, "resumed": False}, [True, False]),
        # Before any topology has changed float32 must agree much better than later.
        (Job("fp32", 1, "sparse"), {"losses": [4.0004, *LOSSES[1:]], "resumed": True}, [False, True]),
        (Job("fp32", 1, "sparse"), {"losses": [*LOSSES[1:], 4.0004], "resumed": True}, [True, True]),
        (Job("bf16", 1, "dense"), {"losses": [4.0015, *LOSSES[1:]], "resumed": True}, [True, True]),
        (Job("bf16", 2, "dense"), {"losses": [*LOSSES[1:], 4.005], "resumed": True}, [False, True]),
        (Job("bf16", 3, "dense"), {"losses": [*LOSSES[1:], float("nan")], "resumed": True}, [False, True]),
        (Job("bf16", 3, "dense"), {"error": "RuntimeError: no memory"}, [False]),
    ],
)
def test_training_that_differs_is_told(job, found, right, tmp_path) -> None:
    context = Context(10, tmp_path / "rows", rehearse=True)
    for folder, each, name in (("device", found, job), ("cpu", {"losses": LOSSES}, job.reference)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(each))
    assert training._tell(context, [job, Job("fp32", 2, "dense")], tmp_path, 0, 1) == 1
    rows = read_rows(context.rows_file)
    assert [row["right"] for row in rows] == right
    assert ("no memory" in rows[0]["note"]) == ("error" in found)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_cache_is_read_in_every_round(tmp_path) -> None:
    """Compiled for sm_90 in a process of its own: loads past the first-level cache, inside of a loop."""
    program = """
from ahead_of_time import compile_source
from triton.compiler import ASTSource
from megasparse.gpu_check.read_kernel import read_kernel
signature = {"source_pointer": "*fp32", "sums_pointer": "*fp32", "num_blocks": "i32", "READS": "constexpr",
             "BLOCK": "constexpr"}
source = ASTSource(read_kernel, signature, {"READS": 64, "BLOCK": 1024}, {(0,): [["tt.divisibility", 16]]})
print(compile_source(source, "sm_90", num_warps=4, num_stages=3).assembly)
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "kernels")])
    done = processes.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    # From a label that is jumped back to, up to the jump.
    label = re.search(r"(?m)^(\$\w+):((?:(?!^\$\w+:).)*?)bra(?:\.uni)?\s+\1;", done.stdout, flags=re.S)
    assert label and "ld.global.cg" in label[2], done.stdout
