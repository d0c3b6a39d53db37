"""launch/serve.py as a process of its own: mistakes in one line, answers over its socket, an orderly end."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from served_models import TestServer, events, text_of, write_folder  # noqa: E402

from megasparse.serving.server import api_key, is_loopback, listen  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "serve.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("process") / "small", "model.seq_length=4096")


def called(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    """Exit status and errors of the script, in this process."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code, capsys.readouterr().err


def test_it_answers_and_ends_in_order(folder) -> None:
    """A whole answer, a streamed one, and one that is told that the server ends, which it does with status 0."""
    command = [sys.executable, SCRIPT, "--model", folder, "--port", 0, "--grace-seconds", 0]
    with processes.Process(command, stderr=subprocess.PIPE) as process:
        for line in process.stderr:
            if found := re.search(r"^small at http://127\.0\.0\.1:(\d+)$", line):
                break
        server = TestServer(int(found.group(1)))
        body = {"model": "small", "prompt": "The cat", "max_tokens": 8, "seed": 1}
        status, answer = server.post("/v1/completions", body)
        assert status == 200 and answer["usage"]["total_tokens"] == 15
        assert text_of(server.stream(body)) == answer["choices"][0]["text"]

        connection = server.open_stream({"prompt": "a", "max_tokens": 4000, "seed": 3})
        found = events(connection.getresponse())
        next(found)
        process.send_signal(signal.SIGTERM)
        last = list(found)[-1]
        connection.close()
        assert last["error"]["code"] == "shutting_down"
        assert process.wait(processes.LIMIT_SECONDS) == 0
        assert process.stderr.read() == "stopped\n"


def test_mistakes_are_one_line(folder, tmp_path, monkeypatch, capsys) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        got = called(monkeypatch, capsys, "--model", folder, "--port", port)
    assert got == (2, f"error: --host 127.0.0.1 --port {port}: Address already in use; must be free here\n")
    status, errors = called(monkeypatch, capsys, "--model", tmp_path)
    assert status == 2 and "no run there; must be a run folder or a model folder" in errors
    status, errors = called(monkeypatch, capsys, "--model", folder, "--cache-mb", 1)
    # 2 layers of 4 heads of 8 float32 numbers, keys and values, of 4,096 tokens.
    assert status == 2 and f"cache_bytes: {1 << 20}; must be at least {4096 * 512}" in errors
    status, errors = called(monkeypatch, capsys, "--model", folder, "--max-seconds", "nan")
    assert status == 2 and "seconds: nan; must be" in errors
    status, errors = called(monkeypatch, capsys, "--model", folder, "--stalled-seconds", 0)
    assert status == 2 and "stalled_seconds: 0.0; must be at least 0.001" in errors
    status, errors = called(monkeypatch, capsys, "--model", folder, "--kernels", "sparse")
    assert status == 2 and "kernels: sparse; no linear layer of the model has zeros; must be auto or dense" in errors
    (tmp_path / "key").write_text(" \n")
    status, errors = called(monkeypatch, capsys, "--model", folder, "--api-key-file", tmp_path / "key")
    assert status == 2 and "must be printable ASCII characters, at least one" in errors


def test_the_extra_that_is_missing_is_named(folder, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "megasparse.serving.server", None)
    status, errors = called(monkeypatch, capsys, "--model", folder)
    assert status == 2 and "serving needs: pip install 'megasparse[serve]'" in errors


def test_keys_and_addresses(tmp_path) -> None:
    assert api_key({}) is None and api_key({"MEGASPARSE_API_KEY": " a b \n"}) == "a b"
    (tmp_path / "key").write_text("of the file\n")
    assert api_key({"MEGASPARSE_API_KEY": "of the environment"}, tmp_path / "key") == "of the file"
    for wrong in ("", "schlüssel", "a\x00"):
        with pytest.raises(ValueError, match="MEGASPARSE_API_KEY: must be printable ASCII"):
            api_key({"MEGASPARSE_API_KEY": wrong})
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))
