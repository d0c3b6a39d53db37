"""Programs that tests start: nothing of them is left when the test ends, fails or is interrupted with Ctrl-C.

done = processes.run([sys.executable, "tool.py"], cwd=folder)     # to its end, output and errors captured
with processes.Process(command, stdout=subprocess.PIPE) as process:
    ...                                                           # ended with the block, if it has not ended before
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

LIMIT_SECONDS = 600
"""For whatever should end by itself. Against hanging, not for measuring: beside 8 busy processes on 2 cores all takes
some five times as long as alone."""

MARK = "STARTED_BY_TEST_"
"""Begins the variables by which a test knows what it has started."""


class Process(subprocess.Popen):
    """A program in a session of its own, so that Ctrl-C reaches the test alone, which then ends all of it.

    What it has started may be in other sessions and may have lost its parents, as the ranks of a launcher that was
    killed. So all are known by a variable in their environment, which they inherit.
    """

    def __init__(self, arguments: Sequence[object], env: Mapping[str, str] | None = None, **options: Any) -> None:
        self.mark = f"{MARK}{secrets.token_hex(8)}"
        environment = {**(os.environ if env is None else env), self.mark: "1"}
        words = [str(word) for word in arguments]
        try:
            super().__init__(
                words, env=environment, text=True, start_new_session=True, preexec_fn=_default_interrupts, **options
            )
        except BaseException:
            # Ctrl-C between its start and our knowing of it.
            self._kill_all()
            raise

    def __exit__(self, *_: object) -> None:
        self.end()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()

    def end(self) -> None:
        """Kill what is left of it and of all that it has started."""
        self._kill_all()
        self.wait()

    def left(self) -> list[psutil.Process]:
        """What is running of it and of all that it has started."""
        found = []
        for process in psutil.process_iter():
            # A process that has ended, or belongs to another user, is none of it.
            with contextlib.suppress(psutil.Error, OSError):
                if self.mark in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _kill_all(self) -> None:
        deadline = time.monotonic() + 60
        # Again until there is none: what is being killed may just have started something.
        while left := self.left():
            assert time.monotonic() < deadline, f"{left} cannot be killed"
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)


def heed_interrupts() -> None:
    """Shells start what runs in the background with Ctrl-C ignored, which a program inherits and would never end by."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _default_interrupts() -> None:
    """For a program about to be executed, which inherits no handler of Python's."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(
    arguments: Sequence[object], *, env: Mapping[str, str] | None = None, timeout: float = LIMIT_SECONDS, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and give back exit status, output and errors."""
    with Process(arguments, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
