"""Programs of the tests whose start is not what is tested: forked, without their imports, by ``fork_server.py``.

with forked.Process([sys.executable, "launch/pretrain.py", ...], environment, stdout=PIPE) as process: ...

All else is as in ``processes.Process``. Each process of the tests starts a server when first asked, and another where
its environment has changed since; they end with that process. Where a test gives a variable that imports may read,
``can_fork`` says no.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import processes
from fork_server import LARGEST_REQUEST, PADDING

PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): whose parent has ended becomes a child of this process."""

RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
READ_LATE = {"COLUMNS", "CXX", "MEGASPARSE_CACHE", "PYTEST_CURRENT_TEST", *RANKS}
"""Variables that programs read when they use them, so that any may differ from the server's; SLURM's, too."""

SPACE = 60_000


def can_fork(arguments: Sequence[object], environment: Mapping[str, str], common: Mapping[str, str]) -> bool:
    """Whether this is a Python script, and its environment `common`, that of all programs of these tests, but for what
    is read late."""
    if str(arguments[0]) != sys.executable or not str(arguments[1]).endswith(".py"):
        return False
    return _kept(environment) == _kept(common)


class Process(processes.Process):
    """``processes.Process`` with another way to come into being."""

    def _execute_child(self, *arguments: Any) -> None:
        """In place of ``subprocess.Popen``'s, whose other parts, pipes and waiting, are kept."""
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments
        pipes = [given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")]
        streams = [pipes[0], pipes[3], pipes[5]]
        streams = [own if stream == -1 else stream for own, stream in enumerate(streams)]
        folder = os.path.abspath(given["cwd"] or os.curdir)
        self.pid = _server(given["env"]).fork(given["args"], given["env"], folder, [*streams, *given["pass_fds"]])
        self._child_created = True
        self._close_pipe_fds(*pipes)


class Server:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = processes.Process(
                [sys.executable, Path(__file__).with_name("fork_server.py"), other.fileno(), "-" * SPACE],
                {PADDING: "-" * SPACE, **_marks(os.environ), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
            )

    def fork(self, words: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[int]) -> int:
        """Id of the new program, a child of this process."""
        # With the server's mark, too: what was asked for when Ctrl-C came may have come into being.
        variables = {**environment, self._process.mark: "1"}
        request = json.dumps({"words": words, "environment": variables, "folder": folder}).encode()
        assert len(request) < LARGEST_REQUEST
        try:
            _adopt(True)
            socket.send_fds(self._channel, [request], list(streams))
            answers = {self._channel.recv(100) for _ in range(2)}
            (number,) = answers - {b"done"}
            return int(number)
        except BaseException:
            self._process.end()
            _started.remove(self)
            raise
        finally:
            _adopt(False)


def _adopt(orphans: bool) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(orphans), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


_started: list[Server] = []


def _server(environment: Mapping[str, str]) -> Server:
    """One for each environment: imports of tests change that of this process."""
    kept = _kept(environment)
    server = next((each for each in _started if each.environment == kept), None)
    if server is None:
        server = Server(kept)
        _started.append(server)
    return server


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    """What a server and the programs that it forks must have alike."""
    late = {*READ_LATE, *_marks(environment)}
    return {name: value for name, value in environment.items() if name not in late and not name.startswith("SLURM_")}


def _marks(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(processes.MARK)}
