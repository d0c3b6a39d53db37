"""The elementwise Triton kernels: in Triton's interpreter, what they compile to, and where they are chosen."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import processes
import pytest
import torch

from megasparse.config.loader import ConfigError, load_config
from megasparse.cost.cpu_kernels import cpu_kernel
from megasparse.kernels import elementwise
from megasparse.kernels.elementwise import gpu

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("interpreted_elementwise.py")


@needs_triton
def test_they_match_float64(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "MEGASPARSE_CACHE": str(tmp_path)}
    done = processes.run([sys.executable, str(SCRIPT)], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") == 4


@needs_triton
@pytest.mark.parametrize("chip", ["sm_90", pytest.param("sm_80", marks=pytest.mark.exhaustive)])
def test_no_spills_and_wide_loads(chip, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import elementwise_ahead_of_time as aot

    for kernel in aot.FUNCTIONS:
        made = aot.compile_kernel(kernel, torch.bfloat16, 128 if kernel == "rotation" else 4096, chip)
        assert made.spills == 0 and made.registers <= 128, (kernel, made.registers, made.spills)
        assert "ld.global.v4.b32" in made.assembly and "st.global.v4.b32" in made.assembly, kernel


def test_where_they_are_chosen(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.ones(2, 4)
    assert not elementwise.takes_triton("auto", x) and not elementwise.takes_cpu("triton", x)
    with pytest.raises(RuntimeError, match="kernels.elementwise: triton cannot be used: they run on cuda, not on cpu"):
        elementwise.takes_triton("triton", x)
    with pytest.raises(RuntimeError, match="dtypes torch.float32, torch.bfloat16"):
        elementwise.takes_triton("triton", x, x.bfloat16())
    monkeypatch.setattr(gpu, "why_not", lambda *_: None)
    assert elementwise.takes_triton("triton", x) and not elementwise.takes_triton("torch", x)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert not elementwise.takes_triton("triton", x)


def test_the_plan_names_them(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = "triton" if importlib.util.find_spec("triton") is not None else "torch"
    assert cpu_kernel(load_config([], []), "elementwise", "cuda", planned=True) == found
    compiled = load_config([], ["train.compile=blocks"])
    assert cpu_kernel(compiled, "elementwise", "cuda", planned=True) == "torch"
    forced = load_config([], ["kernels.elementwise=triton"])
    with pytest.raises(ConfigError, match="kernels.elementwise: triton cannot be used here: .*cpu.*must be auto or"):
        cpu_kernel(forced, "elementwise", "cpu", planned=True)
