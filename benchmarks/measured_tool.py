"""Peak memory and seconds of a tool, for the benchmarks that measure one: measured("prune.py", "--model", folder)."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a process of its own: a measured process inherits the peak of the one that starts it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()


def measured(tool: str, *words: object) -> dict[str, float]:
    """Peak memory, seconds of the clock and seconds of the processor of a script in `tools/` with these words."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    # Linux counts in units of 1,024 bytes.
    return {
        "peak_gb": usage.ru_maxrss * 1024 / 1e9,
        "seconds": time.perf_counter() - started,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
    }
