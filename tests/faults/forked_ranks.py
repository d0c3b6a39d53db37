"""Starts the ranks of a run by forking this process, which has made the imports that cost seconds of a core.

    import_all()                                               # once, before any thread or process group starts
    ended = start_ranks(commands, folder, prepare).wait(60)    # commands: the words of `launch/pretrain.py`, by rank

Each rank runs the entry script as a launcher starts it, after ``prepare(rank)``, where faults are planted. When one
rank has failed, the others are ended as launchers do; or they are left alone, and must end by themselves.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ports import port_of, reserve_port

ENTRY = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"

LAUNCHER_GRACE_SECONDS = 2.0
"""Between the SIGTERM and the SIGKILL of a launcher of which one rank has failed."""

LEFT_OVER_SECONDS = 5.0
"""So long what a rank has started may outlive it: what is killed is there until its new parent has noticed."""

POLL_SECONDS = 0.005
NO_EXIT = 99
"""Status of a rank whose entry script neither left nor raised."""


@dataclass
class Ended:
    """How the ranks of one start ended."""

    statuses: list[int]
    """Exit statuses by rank; those ended by a signal have its negative number."""
    killed: set[int]
    """Ranks that the driver has ended, as a launcher does, or that a planted fault has."""
    hung: bool
    outputs: list[str]
    """What each rank wrote, output and errors."""
    seconds: float

    @property
    def text(self) -> str:
        return "\n".join(self.outputs)


def import_all() -> None:
    """Import what ranks need, so that they need not; no thread is started."""
    os.environ["COLUMNS"] = "200"
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Drawing the page takes longer than the run, and comes when all is saved.
    report = types.ModuleType("megasparse.reporting.report")
    report.write_report = lambda folder: folder / "report.html"
    sys.modules[report.__name__] = report
    import imported_once

    assert imported_once


class Ranks:
    """Running ranks of one start."""

    def __init__(self, processes: list[int], outputs: list[Path], reserved: object, *, alone: bool) -> None:
        self.processes, self._outputs, self._alone = processes, outputs, alone
        self._reserved = reserved
        self._statuses: dict[int, int] = {}
        self.killed: set[int] = set()
        self._began, self._hung = time.monotonic(), False
        self._failed_at: float | None = None

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank that is still running."""
        self._poll()
        if rank not in self._statuses:
            self.killed.add(rank)
            os.kill(self.processes[rank], number)

    def is_running(self) -> bool:
        self._poll()
        return len(self._statuses) < len(self.processes)

    def wait(self, limit: float, meanwhile: Callable[[float], None] = lambda seconds: None) -> Ended:
        """Until all have ended, or `limit` seconds are over. meanwhile: called again and again with the seconds since
        the start."""
        while self.is_running():
            elapsed = time.monotonic() - self._began
            meanwhile(elapsed)
            if elapsed > limit:
                self._hung = True
                self.end()
                break
            self._act_as_launcher()
            time.sleep(POLL_SECONDS)
        self._look_for_left_over()
        self.end()
        return Ended(
            [self._statuses[rank] for rank in range(len(self.processes))],
            self.killed,
            self._hung,
            [path.read_text(encoding="utf-8", errors="replace") for path in self._outputs],
            time.monotonic() - self._began,
        )

    def end(self) -> None:
        """Kill what is left of the ranks and of what they have started."""
        for rank, process in enumerate(self.processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            if rank not in self._statuses:
                self._statuses[rank] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        self._reserved.close()

    def _poll(self) -> None:
        for rank, process in enumerate(self.processes):
            if rank not in self._statuses:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self._statuses[rank] = os.waitstatus_to_exitcode(status)

    def _act_as_launcher(self) -> None:
        if self._alone or not any(self._statuses.values()):
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
            self._send_to_all(signal.SIGTERM)
        elif time.monotonic() - self._failed_at > LAUNCHER_GRACE_SECONDS:
            self._send_to_all(signal.SIGKILL)

    def _send_to_all(self, number: signal.Signals) -> None:
        for rank in range(len(self.processes)):
            self.signal(rank, number)

    def _look_for_left_over(self) -> None:
        """What ranks have started must end with them."""
        until = time.monotonic() + LEFT_OVER_SECONDS
        while any(map(_group_exists, self.processes)):
            if time.monotonic() > until:
                self._hung = True
                return
            time.sleep(POLL_SECONDS)


def _group_exists(process: int) -> bool:
    try:
        os.killpg(process, 0)
    except ProcessLookupError:
        return False
    return True


def start_ranks(
    commands: Sequence[Sequence[str]],
    folder: Path,
    prepare: Callable[[int], None] = lambda rank: None,
    *,
    name: str = "output",
    alone: bool = False,
) -> Ranks:
    """Start a run. commands: words after the name of the script, by rank. folder: the working folder of the ranks;
    `<name>-<rank>.txt` there takes what they write. alone: no launcher ends the others when one has failed."""
    reserved, processes, outputs = reserve_port(), [], []
    for rank, words in enumerate(commands):
        output = folder / f"{name}-{rank}.txt"
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1"}
        variables["MASTER_PORT"] = port_of(reserved)
        process = os.fork()
        if process == 0:
            _be_rank(rank, words, folder, output, variables, prepare)
        processes.append(process)
        outputs.append(output)
    for process in processes:
        with contextlib.suppress(OSError):
            # Also done by the rank itself: whoever comes first.
            os.setpgid(process, process)
    return Ranks(processes, outputs, reserved, alone=alone)


def _be_rank(rank, words, folder, output, variables, prepare) -> None:
    """Never returns."""
    try:
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        os.chdir(folder)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        # As Python sets them, whatever the driver was started with.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ.update({key: str(value) for key, value in variables.items()})
        sys.argv = [str(ENTRY), *words]
        prepare(rank)
        runpy.run_path(str(ENTRY), run_name="__main__")
    except SystemExit as error:
        _leave(int(error.code or 0))
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(NO_EXIT)


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
