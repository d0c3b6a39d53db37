"""Activations in the products of the Triton kernels, in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import processes
import pytest

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).with_name("interpreted_activated.py")


@pytest.mark.parametrize("case", ["products", "kernels", "layers", "apart"])
def test_activations_in_the_products(case, tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "MEGASPARSE_CACHE": str(tmp_path)}
    done = processes.run([sys.executable, str(SCRIPT), case], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{case}: passed\n"
