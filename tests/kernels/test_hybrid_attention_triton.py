"""The Triton kernels of hybrid sparse attention in Triton's interpreter, where they are chosen, and what is said where
they cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import processes
import pytest
import torch

from megasparse.kernels.hybrid_attention import (
    PATTERNS,
    active_entries,
    check_forced,
    executed_entries,
    gpu,
    hybrid_attention,
    select_kernel,
)

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("interpreted_attention.py")
BF16 = torch.bfloat16


def run(command: list[str], **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), **environment}
    done = processes.run([sys.executable, *command], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("cases", [("defaults",), ("edges",), ("heads",), ("layout", "compiled")], ids=" ".join)
def test_equals_the_reference(cases: tuple[str, ...]) -> None:
    assert run([str(SCRIPT), *cases]) == "".join(f"{case}: passed\n" for case in cases)


def test_says_why_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cuda, not on cpu" in gpu.why_not("cpu", torch.float32, 64)
    assert "float64" in gpu.why_not("cuda", torch.float64, 64)
    assert "head_dim 256; supported: up to 128" in gpu.why_not("cuda", BF16, 256)
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="'triton' cannot run: they run on cuda, not on cpu.*auto, reference, tiled"):
        hybrid_attention(q, q, q, "local", 4, kernel="triton")
    with pytest.raises(ValueError, match="cannot run.*head_dim 160.*here it must be auto, reference, tiled$"):
        check_forced("triton", "cuda", BF16, 160)
    for kernel in ("auto", "reference", "tiled"):
        check_forced(kernel, "cpu", torch.float64, 160)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "cpu only" in gpu.why_not("cuda", torch.float32, 64)
    assert "bfloat16; supported: torch.float32" in gpu.why_not("cpu", BF16, 64)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="whether the GPU at hand is suited is another question")
def test_auto_takes_it_on_gpus(monkeypatch) -> None:
    """A plan may be made where the GPU is not."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for pattern in PATTERNS:
        shape = pattern, 1024, 128, "cuda", BF16
        full = pattern == "full"
        assert (select_kernel("auto", *shape, 64) == "triton") != full
        # Documents bound what queries see: the causal kernel knows nothing of them.
        assert select_kernel("auto", *shape, 64, documents=True) == "triton"
        assert select_kernel("auto", *shape, 160) != "triton"
        assert select_kernel("auto", *shape[:3], "cuda", torch.float64, 64) != "triton"
        assert select_kernel("auto", *shape[:3], "cpu", torch.float32, 64) != "triton"
        assert select_kernel("triton", *shape, 64) == "triton"


def test_executed_entries_are_those_of_the_tiles() -> None:
    def executed(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
        return gpu.executed_entries(pattern, seq_length, stride, offset)

    # Tiles of 64 x 64. A window of 128 tokens is 191 keys for 64 queries; fewer at the beginning.
    window = 64 * (64 + 128 + 14 * 192)
    assert executed("local", 1024, 128) == window
    # 8 tokens of a residue are too few for tiles: each query takes its own keys, 4 at a time at most.
    assert active_entries("strided", 1024, 128) <= executed("strided", 1024, 128) <= 64 * 16 * 8
    # 64 tokens of each residue are one tile; under `sparse` it joins the window.
    assert executed("strided", 8192, 128) == 128 * 64 * 64
    assert executed("sparse", 8192, 128) == 128 * 64 * 64 + executed("local", 8192, 128)
    # Halves of a block of 128, and one tile of last keys for every query behind the first block.
    assert executed("fixed", 1024, 128) == 8 * 64 * (64 + 128) + 14 * 64 * 64
    for pattern in ("local", "strided", "sparse", "fixed", "full"):
        for seq_length, stride, offset in ((1, 4, 3), (130, 16, 5), (700, 16, 15), (512, 3, 0), (33, 128, 100)):
            shape = pattern, seq_length, stride, offset
            assert executed(*shape) >= active_entries(*shape)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="whether the GPU at hand is suited is another question")
def test_ledger_counts_its_tiles() -> None:
    counted = executed_entries("auto", "sparse", 1024, 128, "cuda", BF16, 64, offset=3)
    assert counted == gpu.executed_entries("sparse", 1024, 128, 3)


def test_works_without_triton() -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from megasparse.kernels.hybrid_attention import gpu, hybrid_attention, select_kernel
print(gpu.why_not("cuda", torch.bfloat16, 64))
print(select_kernel("auto", "sparse", 1024, 128, "cuda", torch.bfloat16, 64))
q = torch.ones(1, 1, 4, 2)
print(hybrid_attention(q, q, q, "local", 2).sum().item())
"""
    reason, chosen, total = run(["-c", program], TRITON_INTERPRET="0").splitlines()
    assert "triton cannot be imported" in reason and "pip install triton" in reason
    assert chosen == "reference" and total == "8.0"
