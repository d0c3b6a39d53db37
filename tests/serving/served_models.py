"""A small model to serve, a server in a thread of this process, and a client that speaks plain HTTP to it.

with running(served, Limits()) as server:
    status, answer = server.post("/v1/completions", {"prompt": "a"})
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.config.loader import load_config
from megasparse.models.build import build_model
from megasparse.serving.app import Api, build_app
from megasparse.serving.limits import Limits
from megasparse.serving.served import Served
from megasparse.serving.server import Server, listen

CONTEXT = 48
SETTINGS = [
    "data.tokenizer=bytes", "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4",
    f"model.seq_length={CONTEXT}", "model.vocab_size=257", "model.position_embedding=rope", "model.init_std=0.5",
    "sparsity.algorithm=dense",
]  # fmt: skip


def write_folder(folder: Path, *overrides: str) -> Path:
    """A model folder with random weights."""
    config = load_config([], [*SETTINGS, *overrides])
    weights = dict(build_model(config, config.model.vocab_size).named_parameters())
    with ModelFolderWriter(folder, config, {name: torch.float32 for name in weights}) as writer:
        for name in writer.names:
            writer.write(name, weights[name].detach()[: writer.specs[name].shape[0]])
    return folder


class TestServer:
    """Where a server listens, and requests to it."""

    __test__ = False

    def __init__(self, port: int, api: Api | None = None, server: Server | None = None) -> None:
        self.port, self.api, self.server = port, api, server

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, {"Content-Type": "application/json", **headers})

    def ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            self.headers = response.headers
            content = response.read()
        return response.status, json.loads(content) if "json" in response.headers["Content-Type"] else content.decode()

    def open_stream(self, body: dict[str, Any], path: str = "/v1/completions") -> http.client.HTTPConnection:
        """A connection whose answer has begun."""
        connection = self.connection()
        connection.request("POST", path, json.dumps({**body, "stream": True}), {"Content-Type": "application/json"})
        return connection

    def stream(self, body: dict[str, Any], path: str = "/v1/completions") -> list[Any]:
        """All events of a streamed answer; the last one of a whole one is `[DONE]`."""
        with contextlib.closing(self.open_stream(body, path)) as connection:
            return list(events(connection.getresponse()))

    def num_tasks(self) -> int:
        """What the event loop has to do."""
        return len(asyncio.all_tasks(self.server.servers[0].get_loop()))

    def tasks_at_rest(self) -> int:
        """Fewest of them within a second, as the task of a connection outlives its answer."""
        return min((time.sleep(0.05), self.num_tasks())[1] for _ in range(20))

    def until_idle(self) -> None:
        """Wait until all slots are free."""
        until(lambda: self.get("/health")[1]["running"] == self.get("/health")[1]["waiting"] == 0)


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
    for line in response:
        if line.strip():
            assert line.startswith(b"data: ")
            data = line.removeprefix(b"data: ").decode().strip()
            yield data if data == "[DONE]" else json.loads(data)


def text_of(found: list[Any], index: int = 0) -> str:
    choices = [choice for event in found if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def until(condition, seconds: float = 120) -> None:
    """Wait for it; the limit is against hanging."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


@contextlib.contextmanager
def running(served: Served, limits: Limits, *, grace_seconds: float = 0, **options: Any) -> Iterator[TestServer]:
    """The application on a free port of this machine, answering in a thread."""
    app = build_app(served, limits, **options)
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=60)
    server = Server(config, "", grace_seconds)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        until(lambda: server.started)
        yield TestServer(listening.getsockname()[1], app.state.api, server)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Gate:
    """Holds a model before each forward pass until it may go on: the pace of a batch in the hands of a test."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._passes = threading.Semaphore(0)
        self._open = False
        self.evaluated: list[tuple[int, ...]] = []
        self._hook = model.register_forward_pre_hook(self._wait)

    def _wait(self, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if not self._open:
            assert self._passes.acquire(timeout=120)
        self.evaluated.append(tuple(arguments[0].shape))

    def let(self, count: int) -> None:
        self._passes.release(count)

    def open(self) -> None:
        self._open = True
        self._passes.release(1)

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.open()
        self._hook.remove()
