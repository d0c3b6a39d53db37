"""The Triton kernels of the sparse linear layer in Triton's interpreter, and what is said where they cannot run."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import processes
import pytest
import torch

from megasparse.kernels.block_sparse import check_forced, gpu, tuning

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("interpreted_products.py")


def run(command: list[str], tmp_path: Path, **environment: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "MEGASPARSE_CACHE": str(tmp_path), **environment}
    done = processes.run([sys.executable, *command], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("case", ["products", "tiles", "inputs", "packed"])
def test_products_match_float64(case, tmp_path) -> None:
    assert run([str(SCRIPT), case], tmp_path) == f"{case}: passed\n"


@needs_triton
def test_autograd_and_tuned_tiles_that_are_kept(tmp_path) -> None:
    assert run([str(SCRIPT), "autograd", "tune"], tmp_path) == "autograd: passed\ntune: passed\n"
    assert (tmp_path / "triton_tiles.json").is_file()


def test_says_why_it_cannot_run(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cuda, not on cpu" in gpu.why_not("cpu", torch.float32, 32)
    assert "float64" in gpu.why_not("cuda", torch.float64, 32)
    assert "sparsity.block_size 48; supported: 16, 32, 64, 128" in gpu.why_not("cuda", torch.bfloat16, 48)
    if not torch.cuda.is_available():
        assert gpu.why_not("cuda", torch.bfloat16, 64) is not None
    with pytest.raises(ValueError, match="'triton' cannot run: they run on cuda, not on cpu.*here it must be"):
        check_forced("triton", "cpu", torch.float32, 32)
    # A plan may be made where the GPU is not.
    if importlib.util.find_spec("triton") is not None:
        assert gpu.why_not("cuda", torch.bfloat16, 64, planned=True) is None
    with pytest.raises(ValueError, match="cannot be tuned here"):
        tuning.tune_layer("cpu", torch.float32, 32, 8, (64, 64), 0.5)


def test_interpreter_takes_float32_on_cpu_only(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "cpu only" in gpu.why_not("cuda", torch.float32, 32)
    assert "bfloat16; supported: torch.float32" in gpu.why_not("cpu", torch.bfloat16, 32)


def test_works_without_triton(tmp_path) -> None:
    program = """
import sys
sys.modules["triton"] = None
import torch
from megasparse.kernels.block_sparse import build_index, gpu, sparse_linear
print(gpu.why_not("cuda", torch.bfloat16, 64))
mask = torch.eye(2, dtype=torch.bool)
print(sparse_linear(torch.ones(1, 32), torch.eye(32), None, build_index(mask, 16), kernel="dense").sum().item())
"""
    reason, total = run(["-c", program], tmp_path, TRITON_INTERPRET="0").splitlines()
    assert "triton cannot be imported" in reason and "pip install triton" in reason
    assert total == "32.0"
