"""Clients that do not read their answers: nobody waits for them, and they do not stay."""

from __future__ import annotations

import contextlib
import json
import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from served_models import Gate, TestServer, events, running, text_of, until, write_folder  # noqa: E402

from megasparse.inference.sampling import sample_text  # noqa: E402
from megasparse.serving import server as server_module  # noqa: E402
from megasparse.serving.limits import Limits  # noqa: E402
from megasparse.serving.served import Served, open_served  # noqa: E402
from megasparse.serving.server import Unchanged  # noqa: E402

TEXTS, TOKENS = 16, 400
LIMITS = Limits(streams=TEXTS + 1, stalled_seconds=1.0)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return open_served(write_folder(tmp_path_factory.mktemp("read") / "small", "model.seq_length=512"))


def ask_and_not_read(server: TestServer, num_texts: int, num_tokens: int, stream: bool = True) -> socket.socket:
    """A client that takes little before it reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.settimeout(120)
    client.connect(("127.0.0.1", server.port))
    body = json.dumps({"prompt": "a", "n": num_texts, "max_tokens": num_tokens, "stream": stream})
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    client.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{body}".encode())
    return client


def unsent(server: TestServer) -> int:
    return sum(found.transport.get_write_buffer_size() for found in list(server.server.server_state.connections))


def test_a_client_that_does_not_read_loses_its_place_and_nobody_waits_for_it(served) -> None:
    """Some 900 kB of events, of which the system takes less than 100."""
    text = sample_text(served.trained.model, served.trained.tokenizer, "a", 4, seed=0, temperature=0)
    with running(served, LIMITS) as server, Gate(served.trained.model) as gate:
        with contextlib.closing(ask_and_not_read(server, TEXTS, TOKENS)):
            gate.let(300)
            until(lambda: unsent(server) > 0)
            streams = [found.stream for found in list(server.api.batch.running)]
            with contextlib.closing(server.open_stream({"prompt": "a", "max_tokens": 4, "temperature": 0})) as other:
                gate.let(10)
                assert text_of(list(events(other.getresponse()))) == text.removeprefix("a")
            # The model waits, so that the texts have not ended by themselves.
            until(lambda: not server.server.server_state.connections)
            until(lambda: all(stream.cancelled for stream in streams))
            gate.open()
            server.until_idle()
            assert server.api.batch.running == [] and server.api.batch.cache_bytes == 0


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_is_complete_is_not_kept_for_who_does_not_read_it(served, monkeypatch, stream) -> None:
    monkeypatch.setattr(server_module, "SEND_BUFFER_BYTES", 4096)
    with running(served, LIMITS) as server, Gate(served.trained.model) as gate:
        with contextlib.closing(ask_and_not_read(server, TEXTS, TOKENS // 4 if stream else TOKENS, stream)):
            until(lambda: server.api.worker.num_streams == TEXTS)
            gate.open()
            until(lambda: not server.server.server_state.connections)
            server.until_idle()


def test_any_change_begins_the_time_anew(monkeypatch) -> None:
    times = iter(range(9))
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    watch = Unchanged()
    seen = [{"a": 5, "b": 5}, {"a": 5, "b": 4}, {"a": 5, "b": 4}, {"a": 5, "b": 6}, {"a": 5}, {"b": 6}, {"b": 6}]
    expected = [[], [], [], ["a"], ["a"], [], []]
    assert [watch.longer_than(2, states) for states in seen] == expected
