"""The server process: a socket, signals, an orderly end.

    serve(served, Limits(), host="127.0.0.1", port=8000, api_key=None, grace_seconds=10)

SIGTERM or Ctrl-C: no new requests; running texts have `grace_seconds` to end, then their clients are told, and the
process ends with status 0. A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from megasparse.serving.app import LOOPBACK, build_app
from megasparse.serving.limits import Limits
from megasparse.serving.served import Served

KEY_VARIABLE = "MEGASPARSE_API_KEY"
HEADER_SECONDS = 30
"""For the head of a request; of a silent connection, for its first one."""
SEND_BUFFER_BYTES = 32 << 10
"""What the system may hold of an answer for a client. Left to itself it takes several MB, more than most answers have:
a client that does not read would pass for one that does."""
MOST_CONNECTIONS_PER_STREAM = 4
"""Connections beyond are answered with status 503: each may hold a body, or be slow."""


class Server(uvicorn.Server):
    """Says where it is once signals end it in order; ends running texts once they had their time; closes connections
    that ask for nothing, or do not read what they have asked for, as they count among those that are allowed."""

    def __init__(self, config: uvicorn.Config, greeting: str, grace_seconds: float) -> None:
        super().__init__(config)
        self._greeting, self._grace_seconds = greeting, grace_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._closing = asyncio.create_task(self._close_idle())
        print(self._greeting, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        worker = self.config.app.state.api.worker  # type: ignore[union-attr]
        ending = asyncio.create_task(self._end_streams(worker))
        await super().shutdown(sockets)
        ending.cancel()
        self._closing.cancel()

    async def _close_idle(self) -> None:
        """uvicorn closes what is idle after a request, unless it sends half of another one; and it waits for ever until
        an answer is read."""
        stalled_seconds = self.config.app.state.api.limits.stalled_seconds  # type: ignore[union-attr]
        silent, unread = Unchanged(), Unchanged()
        while True:
            await asyncio.sleep(min(HEADER_SECONDS / 10, stalled_seconds / 10, 1))
            connections = list(self.server_state.connections)
            for connection in silent.longer_than(HEADER_SECONDS, dict(_without_request(connections))):
                connection.transport.close()
            # As much to send as before: nothing was read of it, and nothing is added while it is too much.
            sizes = {connection: connection.transport.get_write_buffer_size() for connection in connections}
            left = {connection: size for connection, size in sizes.items() if size}
            for connection in unread.longer_than(stalled_seconds, left):
                # `close` would wait until the rest is read. The request learns that its client has gone.
                connection.transport.abort()

    async def _end_streams(self, worker) -> None:
        await asyncio.sleep(self._grace_seconds)
        await asyncio.to_thread(worker.stop)


class Unchanged:
    """Since when the states of connections are what they are."""

    def __init__(self) -> None:
        self._since: dict[Any, tuple[Any, float]] = {}

    def longer_than(self, seconds: float, states: Mapping[Any, Any]) -> list[Any]:
        """Connections whose state, of those that have one, was the same at each call for so long."""
        now, before = time.monotonic(), self._since
        self._since = {connection: (state, now) for connection, state in states.items()}
        for connection, (state, since) in before.items():
            if connection in states and states[connection] == state:
                self._since[connection] = state, since
        return [connection for connection, (_, since) in self._since.items() if now - since > seconds]


def _without_request(connections: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Those that are not being answered, with their last request."""
    for connection in connections:
        request: Any = getattr(connection, "cycle", None)
        if request is None or request.response_complete:
            yield connection, request


def serve(served: Served, limits: Limits, *, host: str, port: int, api_key: str | None, grace_seconds: float) -> None:
    """Answer until a signal comes. Raises OSError where the address cannot be had."""
    loopback = is_loopback(host)
    shown = f"[{host}]" if ":" in host else host
    app = build_app(served, limits, api_key=api_key, hosts={*LOOPBACK, shown} if loopback else None)
    # By us, so that a port in use is one line.
    listening = listen(host, port)
    greeting = f"{served.name} at http://{shown}:{listening.getsockname()[1]}"
    if not loopback and api_key is None:
        print(f"warning: anyone who reaches {host} can use it; {KEY_VARIABLE} asks for a key", file=sys.stderr)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS_PER_STREAM * (limits.streams + limits.queue),
        # Texts are told before; what is left then is a client that does not read.
        timeout_graceful_shutdown=int(grace_seconds) + 5,
    )
    server = Server(config, greeting, grace_seconds)

    def end(number: int, frame: object) -> None:
        # uvicorn raises the signal that has ended it once more, when there is nothing left to do.
        if not server.started:
            sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.run([listening])
    print("stopped", file=sys.stderr)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        # Python's own text of it repeats the address; errors of the look-up have negative numbers.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or error
        raise OSError(f"--host {host} --port {port}: {reason}; must be free here") from None
    # Connections have it from here.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listening.setblocking(False)
    return listening


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(variables: Mapping[str, str] = os.environ, file: Path | None = None) -> str | None:
    """The key that clients must send: of a file, or of the environment; None: none is asked for.

    Raises ValueError for an empty or unprintable one, and OSError for a file that cannot be read.
    """
    if file is None and KEY_VARIABLE not in variables:
        return None
    key = (variables[KEY_VARIABLE] if file is None else file.read_text(encoding="utf-8")).strip()
    if not key or not (key.isascii() and key.isprintable()):
        where = KEY_VARIABLE if file is None else f"--api-key-file {file}"
        raise ValueError(f"{where}: must be printable ASCII characters, at least one")
    return key
