"""Runs side by side: so many at a time, each a process; what has finished is skipped, what fails is told.

    with Crew(make_slots(None, num_runs), command, print) as crew:
        failures = crew.run(jobs)                # {name of a run: why}

SIGTERM or Ctrl-C stops the runs with SIGTERM, upon which they save and leave, and raises Stopped; a second one kills
them. Should this process be killed itself, the system sends them SIGTERM. Each goes on from its checkpoint when it is
started again.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from megasparse.config.loader import ConfigError
from megasparse.studies.jobs import Job
from megasparse.utils.files import make_folders
from megasparse.utils.format import format_decimal, format_seconds

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal to a process when its parent dies."""

Command = Callable[[Job], list[str]]
After = Callable[[dict[str, str]], object]


class Stopped(Exception):
    """The study was told to stop; all of its runs have ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.status = 128 + number


def make_slots(processes: int | None, num_runs: int) -> list[dict[str, str]]:
    """Variables for each of the runs at a time: a GPU, or its share of the cores. processes: None: as many as fit.

    Raises ConfigError for more processes than GPUs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = torch.cuda.device_count() if os.environ.get("DS_ACCELERATOR") != "cpu" else 0
    count = max(min(processes or gpus or cores, num_runs), 1)
    threads = {"OMP_NUM_THREADS": str(max(cores // count, 1))}
    if not gpus:
        return [threads] * count
    if count > gpus:
        raise ConfigError(f"processes: {count} on {gpus} GPUs; must be at most that many")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    return [{**threads, "CUDA_VISIBLE_DEVICES": visible[number]} for number in range(count)]


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float
    log_start: int
    """Bytes that earlier starts have left in the log."""

    def last_words(self) -> str | None:
        """The last error that the run has printed."""
        lines = self.job.log_file.read_bytes()[self.log_start :].decode("utf-8", "replace").splitlines()
        return next((line for line in reversed(lines) if "rror" in line.split(":")[0]), None)


class Crew:
    """Runs jobs, at most one for each slot at a time, while it is open."""

    def __init__(self, slots: Sequence[Mapping[str, str]], command: Command, tell: Callable[[str], None]) -> None:
        self._slots, self._command, self._tell = slots, command, tell
        self._running: dict[int, _Running] = {}
        self._previous: dict[int, Any] = {}
        self._signal: int | None = None

    def __enter__(self) -> Crew:
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._send(signal.SIGKILL)  # after an error only: otherwise none is left
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, jobs: Sequence[Job], after: After = lambda failures: None) -> dict[str, str]:
        """Run all that have not finished; why those failed that did. Raises Stopped.

        after: told the failures so far when a run has ended.
        """
        waiting, failures = deque(job for job in jobs if not job.finished), dict[str, str]()
        if len(waiting) < len(jobs):
            self._tell(f"{len(jobs) - len(waiting)} of {len(jobs)} runs have finished before")
        while (waiting and self._signal is None) or self._running:
            for slot in set(range(len(self._slots))) - self._running.keys():
                if waiting and self._signal is None:
                    self._start(slot, waiting.popleft())
            time.sleep(POLL_SECONDS)
            for slot, one in list(self._running.items()):
                if one.process.poll() is not None:
                    del self._running[slot]
                    if self._signal is None:
                        self._tell_end(one, failures)
                        after(failures)
        if self._signal is not None:
            raise Stopped(self._signal)
        return failures

    def _start(self, slot: int, job: Job) -> None:
        make_folders(job.log_file.parent)
        self._tell(f"{job.name}: started" if not job.folder.exists() else f"{job.name}: goes on")
        with job.log_file.open("ab") as log:
            log_start = log.tell()
            process = subprocess.Popen(
                self._command(job),
                env={**os.environ, **self._slots[slot]},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C of a terminal reaches this process alone, which passes it on.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        self._running[slot] = _Running(job, process, time.monotonic(), log_start)
        if self._signal is not None:
            # It came while the process was made, which was not among the running ones yet.
            process.send_signal(signal.SIGTERM)

    def _tell_end(self, one: _Running, failures: dict[str, str]) -> None:
        job, status, seconds = one.job, one.process.returncode, time.monotonic() - one.started
        if status == 0 and job.finished:
            self._tell(f"{job.name}: validation loss {format_decimal(job.val_loss, 4)}, {format_seconds(seconds)}")
            return
        how = "it ended before its last step" if status == 0 else f"exit status {status}"
        failures[job.name] = f"{one.last_words() or how} ({job.log_file})"
        self._tell(f"{job.name}: failed: {failures[job.name]}")

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._signal is not None:
            self._send(signal.SIGKILL)
        else:
            self._signal = number
            self._send(signal.SIGTERM)
            self._tell("stopping: the runs save and leave; once more kills them")

    def _send(self, number: int) -> None:
        for one in list(self._running.values()):
            one.process.send_signal(number)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
