"""Calls of tools/check_gpu.py in processes of their own, with what a test does to the package before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import processes

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "check_gpu.py"

FORBID = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "pydantic", "omegaconf"):
            raise ModuleNotFoundError(f"{name} is forbidden here", name=name)

sys.meta_path.insert(0, Forbidden())
"""
"""As `sitecustomize.py`: these packages cannot be imported, as where they are not installed."""

RUN = """
import runpy, sys
sys.argv = {words!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def environment(tmp_path: Path, *, forbid: bool = False) -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = [str(ROOT)]
    if forbid:
        (tmp_path / "sitecustomize.py").write_text(FORBID, encoding="utf-8")
        path.insert(0, str(tmp_path))
    return found | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def words(output: Path, *options: str, before: str = "") -> list[str]:
    """The command line. before: lines of Python that run first in the same process."""
    call = [str(TOOL), "--rehearse", "--output", str(output), *options]
    return [sys.executable, "-c", before + RUN.format(words=call)] if before else [sys.executable, *call]


def check(
    tmp_path: Path, *options: str, before: str = "", forbid: bool = False
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What the command has printed, and its file."""
    output = tmp_path / "check.json"
    command = words(output, *options, before=before)
    done = processes.run(command, env=environment(tmp_path, forbid=forbid))
    return done, json.loads(output.read_text(encoding="utf-8"))


def states(report: dict[str, Any]) -> dict[str, str]:
    return {name: section["state"] for name, section in report["sections"].items()}


def rows(report: dict[str, Any]) -> Sequence[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, section in report["sections"].items() for row in section["rows"]]
