"""Runs a function in a forked process with a time limit; whatever becomes of it, its caller goes on.

    outcome = run_limited(function, seconds=60, log=folder / "facts.txt")

Forked, so that torch is imported once: nothing here or in a caller may have touched a GPU, as CUDA does not survive a
fork. At the limit the process is killed with all that it has started, and its log ends with where it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

DONE, FAILED, STOPPED, UNAVAILABLE = "done", "failed", "stopped", "unavailable"
LAST_LINES = 40
"""Enough for the stack of a process that crashed or hung, and what it has printed before."""
UNTOLD = ("/multiprocessing/", "Extension modules:")
"""What stands in lines of a stack that say nothing of where a process was."""
MISSING_PACKAGE = 77
"""Exit status of a process that lacks a package of somebody else."""
STACKS_SECONDS = 2.0
"""For a process at its limit to write down where its threads are."""
DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
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
    process = start(function, log)
    try:
        process.join(seconds)
        in_time = not process.is_alive()
        if not in_time:
            write_stacks([process])
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
    ending = f"killed at its limit of {seconds:.0f} s" if state == STOPPED else f"exit status {process.exitcode}"
    return Outcome(state, elapsed, (*last_lines(log), ending))


def last_lines(log: Path) -> list[str]:
    """The end of what a process has printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return [line for line in lines if not any(words in line for words in UNTOLD)][-LAST_LINES:]


def start(function: Callable[[], Any], log: Path, **variables: str) -> BaseProcess:
    """Begin it, in a session of its own. variables: added to its environment."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_work, args=(function, log, variables))
    process.start()
    return process


def write_stacks(processes: Sequence[BaseProcess]) -> None:
    """Let processes write to their logs where their threads are."""
    for process in processes:
        if process.pid is not None and process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGUSR2)
    time.sleep(STACKS_SECONDS)


def end(process: BaseProcess) -> None:
    """Kill it, where it is there still, and what it has started."""
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # it may not have come to its setsid
        process.join(KILLED_SECONDS)


def require(package: str) -> None:
    """Raise ModuleNotFoundError where a package is not installed, before anything is begun that needs it."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)


def _work(function: Callable[[], Any], log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    # Linux: what outlives its caller, in a session of its own, would keep the device busy for nobody.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.update(variables)
    faulthandler.enable(file=sys.stderr)
    # Not by faulthandler's own timer: that is a thread, and leaves a lock held in what this process forks.
    faulthandler.register(signal.SIGUSR2, file=sys.stderr)
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
