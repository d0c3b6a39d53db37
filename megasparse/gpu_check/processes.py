"""Runs a function in a forked process with a time limit; whatever becomes of it, its caller goes on.

    outcome = run_limited(function, seconds=60, log=folder / "facts.txt")

Forked, so that torch is imported once: nothing here or in a caller may have touched a GPU, as CUDA does not survive a
fork. At the limit the process is killed with all that it has started, and its log ends with where it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

DONE, FAILED, STOPPED, UNAVAILABLE = "done", "failed", "stopped", "unavailable"
LAST_LINES = 12
MISSING_PACKAGE = 77
"""Exit status of a process that lacks a package of somebody else."""
STACKS_SECONDS = 2.0
"""Before the limit, the process writes down where its threads are."""
KILLED_SECONDS = 10.0
"""How long the end of a killed process is waited for: one that hangs in a driver may never end."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended."""

    state: str
    seconds: float
    last_lines: tuple[str, ...] = ()
    """Of what it has printed, where it did not end well."""


def run_limited(function: Callable[[], Any], seconds: float, log: Path) -> Outcome:
    """Call `function` in a process of its own, for `seconds` at most; `log` gets what it prints."""
    started = time.monotonic()
    process = start(function, seconds, log)
    try:
        process.join(seconds)
        in_time = not process.is_alive()
    finally:
        end(process)
    state = FAILED
    if not in_time:
        state = STOPPED
    elif process.exitcode == 0:
        state = DONE
    elif process.exitcode == MISSING_PACKAGE:
        state = UNAVAILABLE
    elapsed = time.monotonic() - started
    if state == DONE:
        return Outcome(state, elapsed)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LAST_LINES:]
    ending = f"killed at its limit of {seconds:.0f} s" if state == STOPPED else f"exit status {process.exitcode}"
    return Outcome(state, elapsed, (*lines, ending))


def start(function: Callable[[], Any], seconds: float, log: Path, **variables: str) -> BaseProcess:
    """Begin it, in a session of its own. variables: added to its environment."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_work, args=(function, seconds, log, variables))
    process.start()
    return process


def end(process: BaseProcess) -> None:
    """Kill it, where it is there still, and what it has started."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # it may not have come to its setsid
        process.join(KILLED_SECONDS)


def _work(function: Callable[[], Any], seconds: float, log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(variables)
    faulthandler.enable(file=sys.stderr)
    faulthandler.dump_traceback_later(max(seconds - STACKS_SECONDS, 0.9 * seconds), file=sys.stderr)
    status = 0
    try:
        function()
    except ModuleNotFoundError as error:
        traceback.print_exc()
        status = 1 if (error.name or "megasparse").startswith("megasparse") else MISSING_PACKAGE
    except BaseException:
        traceback.print_exc()
        status = 1
    # Destructors of devices and process groups may hang; the rows are on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
