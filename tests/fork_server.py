"""Forks Python programs from a process that has made their imports, which cost five seconds of a core at each start.

It is started and asked by ``forked.py``. A program so started has its words, environment, folder, streams and session
as if it had been started itself, also for those who look at /proc, and its parent is the process that has asked. It may
fork programs of its own: ``fork(words, environment)``. It ends when the asking process has gone.

Not as in a start of its own: variables that imports read have the server's values, Python's hashes the server's seed,
and pages of reports no figures.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

PADDING = "SPACE_FOR_THE_ENVIRONMENT"
"""A long variable, first in the server's environment, where a program's own is written for /proc."""

LARGEST_REQUEST = 1 << 17
MOST_STREAMS = 16


class Forked:
    """What this process has forked, with the methods of ``subprocess.Popen`` that ``ranks.py`` uses."""

    def __init__(self, process: int) -> None:
        self.pid, self.returncode = process, None

    def poll(self) -> int | None:
        self._look(os.WNOHANG)
        return self.returncode

    def wait(self) -> int | None:
        self._look(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _look(self, options: int) -> None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, options)
            if found:
                self.returncode = os.waitstatus_to_exitcode(status)


def fork(words: Sequence[str], environment: Mapping[str, str]) -> Forked:
    """Start `python script words...` from a program that was forked itself, in its folder and with its streams."""
    process = os.fork()
    if process == 0:
        show(words, environment)
        run(words, environment)
        sys.exit()
    return Forked(process)


def run(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Be the program: its end, by whatever, is that of this interpreter."""
    os.environ.update(environment)
    _, *sys.argv = words
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def show(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Let /proc, and so psutil, tell words and environment of the program: Linux reads them where they were put at the
    start of the process (proc(5), fields 48 to 51 of `stat`)."""
    # First, for the C library's list of variables points to where the text is about to be.
    os.environ.clear()
    numbers = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    words_from, words_to, variables_from, variables_to = (int(number) for number in numbers[45:49])
    _write(words_from, words_to, words)
    _write(variables_from, variables_to, [f"{name}={value}" for name, value in environment.items()])


def _write(start: int, end: int, texts: Sequence[str]) -> None:
    content = b"".join(os.fsencode(text) + b"\0" for text in texts)
    assert len(content) < end - start, "the server was started with too little space"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, content, len(content))


def serve(channel: socket.socket) -> None:
    """Answer each request with the id of the program and, once this process has let go of it, with `done`."""
    os.environ.pop(PADDING)
    import imported_once

    assert imported_once
    while True:
        text, streams, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, MOST_STREAMS)
        if not text:
            return
        request = json.loads(text)
        between = os.fork()
        if between == 0:
            show(request["words"], request["environment"])
            # A program without parent goes to the process that has asked, which has made itself the reaper of such.
            parent = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == parent:
                time.sleep(0.001)
            os.setsid()
            channel.send(str(os.getpid()).encode())
            channel.close()
            _take(streams)
            os.chdir(request["folder"])
            return run(request["words"], request["environment"])
        os.waitpid(between, 0)
        for stream in streams:
            os.close(stream)
        channel.send(b"done")


def _take(streams: Sequence[int]) -> None:
    """Input, output, errors; what follows stays open, under another number than it had."""
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
        os.close(stream)
    for stream in streams[3:]:
        os.set_inheritable(stream, True)
    # What Python knows of them is of the server's: whether they can seek, for instance.
    sys.stdin = sys.__stdin__ = open(0, encoding=sys.stdin.encoding, closefd=False)
    sys.stdout = sys.__stdout__ = _writer(1, sys.stdout, line_buffering=False)
    sys.stderr = sys.__stderr__ = _writer(2, sys.stderr, line_buffering=True)


def _writer(number: int, like: TextIO, *, line_buffering: bool) -> TextIO:
    stream = open(number, "w", encoding=like.encoding, errors=like.errors, closefd=False)
    stream.reconfigure(line_buffering=line_buffering)
    return stream


if __name__ == "__main__":
    # Under its own name, by which programs find it.
    import fork_server

    fork_server.serve(socket.socket(fileno=int(sys.argv[1])))
