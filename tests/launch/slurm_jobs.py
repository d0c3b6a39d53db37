"""What the tests of SLURM jobs share: settings of a small run, the submit tool as a user calls it, patience."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
from runs import REPOSITORY, TINY

SCRIPTS = REPOSITORY / "launch" / "slurm"


def settings(corpus: Path, folder: Path, *overrides: str) -> list[str]:
    return [*TINY, f"data.train=[{{path: {corpus}}}]", f"run.folder={folder}", *overrides]


def submit(
    words: list[str], options: list[str], environment: dict[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    # Not by ``processes``: a job outlives what submits it, with the environment of that.
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "submit.py"), *words, *options],
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        timeout=processes.LIMIT_SECONDS,
    )


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)
