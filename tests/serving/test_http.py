"""The HTTP interface over real sockets, in this process: answers in OpenAI's shapes, limits, clients that go away."""

from __future__ import annotations

import contextlib
import gc
import json
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from served_models import CONTEXT, Gate, events, running, text_of, until, write_folder  # noqa: E402
from starlette.datastructures import URL  # noqa: E402
from starlette.requests import Request  # noqa: E402

from megasparse.inference.sampling import sample_text  # noqa: E402
from megasparse.serving import server as server_module  # noqa: E402
from megasparse.serving.batch import Running  # noqa: E402
from megasparse.serving.exchange import Exchange  # noqa: E402
from megasparse.serving.limits import Limits  # noqa: E402
from megasparse.serving.served import Served, open_served  # noqa: E402

LIMITS = Limits(streams=4, queue=2, tokens=40, body_bytes=5000)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return open_served(write_folder(tmp_path_factory.mktemp("served") / "small"))


@pytest.fixture(scope="module")
def server(served):
    with running(served, LIMITS) as found:
        yield found


def expected(served: Served, prompt: str, num_tokens: int, **options) -> str:
    """What generate.py prints of it."""
    text = sample_text(served.trained.model, served.trained.tokenizer, prompt, num_tokens, **{"seed": 0, **options})
    return text.removeprefix(prompt)


def test_a_completion_is_the_text_of_sampling(server, served) -> None:
    body = {"model": "small", "prompt": "The cat", "max_tokens": 12, "temperature": 0}
    status, answer = server.post(COMPLETIONS, body)
    text = expected(served, "The cat", 12, temperature=0)
    assert status == 200 and answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    assert answer["model"] == "small" and isinstance(answer["created"], int)

    drawn = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 5}
    _, answer = server.post(COMPLETIONS, {**body, **drawn})
    assert answer["choices"][0]["text"] == expected(served, "The cat", 12, **drawn)
    # U+FFFD, which also stands for bytes that are no character, is not said again.
    _, answer = server.post(COMPLETIONS, {**body, "prompt": "cat \ufffd"})
    assert answer["choices"][0]["text"] == expected(served, "cat \ufffd", 12, temperature=0)


def test_prompts_and_choices_are_numbered_as_samples_are(server, served) -> None:
    for prompt in (["ab", "x"], [[97, 98], [120]]):
        _, answer = server.post(COMPLETIONS, {"prompt": prompt, "n": 2, "seed": 7, "max_tokens": 6, "top_k": 50})
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts == [
            expected(served, prompt, 6, seed=seed, temperature=1.0) for prompt in ("ab", "x") for seed in (7, 8)
        ]
        assert answer["usage"]["prompt_tokens"] == 3 and answer["usage"]["completion_tokens"] == 24
    one = server.post(COMPLETIONS, {"prompt": [97, 98], "seed": 7, "max_tokens": 6, "top_k": 50})[1]
    assert one["choices"][0]["text"] == texts[0]
    # No prompt, or an empty one, is the beginning of a document; without a number of tokens there are 16.
    begins = [
        server.post(COMPLETIONS, {**body, "temperature": 0})[1] for body in ({}, {"prompt": ""}, {"prompt": [256]})
    ]
    assert begins[0]["choices"] == begins[1]["choices"] == begins[2]["choices"]
    assert begins[0]["usage"] == {"prompt_tokens": 1, "completion_tokens": 16, "total_tokens": 17}


def test_a_text_without_a_seed_is_another_one_each_time(server) -> None:
    texts = [server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 30})[1]["choices"][0]["text"] for _ in range(2)]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stop", [None, ["q", "zz"], "e"])
def test_a_streamed_answer_is_the_answer(server, stop) -> None:
    body = {"prompt": ["The cat", "été"], "max_tokens": 30, "seed": 3, "stop": stop, "temperature": 0.9}
    _, whole = server.post(COMPLETIONS, body)
    found = server.stream({**body, "stream_options": {"include_usage": True}})
    assert found[-1] == "[DONE]" and found[-2]["choices"] == [] and found[-2]["usage"] == whole["usage"]
    assert len({event["id"] for event in found[:-1]}) == 1
    assert {event["object"] for event in found[:-1]} == {"text_completion"}
    for choice in whole["choices"]:
        assert text_of(found[:-2], choice["index"]) == choice["text"]
        own = [event["choices"][0] for event in found[:-2] if event["choices"][0]["index"] == choice["index"]]
        assert [piece["finish_reason"] for piece in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    # The counts come only where they are asked for.
    assert all("usage" not in event for event in server.stream(body)[:-1])


REFUSED = [
    (b"{", 400, None, "the body is no JSON"),
    (b"[" * 4000, 400, None, "the body is no JSON"),
    (b"[]", 400, None, "the body must be a JSON object"),
    (b" " * 6000, 413, None, "the body has more than 5000 bytes"),
    ({"prompt": "a", "max_token": 3}, 400, "max_token", "max_token: this server does not know the field"),
    ({"stream": True, "stream_options": {"a": 1}}, 400, "stream_options.a", "does not know the field"),
    ({"\ud800": 1}, 400, None, "\\ud800"),
    ({"stream_options": {}}, 400, "stream_options", "stream_options: only with stream=true"),
    ({"model": "gpt-4"}, 404, "model", "model: 'gpt-4'; must be 'small'"),
    ({"prompt": 5}, 400, "prompt", "prompt: 5; must be text, a list of texts, token ids, or"),
    ({"prompt": []}, 400, "prompt", "prompt: []; must be"),
    ({"prompt": ["a", 1]}, 400, "prompt", "must be text"),
    ({"prompt": [True]}, 400, "prompt", "must be text"),
    ({"prompt": [[97], []]}, 400, "prompt", "must be text"),
    ({"prompt": [97, 257]}, 400, "prompt", "prompt: token id 257; must be 0 to 256"),
    ({"prompt": "\ud800"}, 400, "prompt", "half of a surrogate pair"),
    ({"prompt": "a" * 48}, 400, "prompt", "prompt: 48 tokens; must be fewer than the model's context of 48"),
    (
        {"prompt": "a" * 40, "max_tokens": 9},
        400,
        "max_tokens",
        "max_tokens: 9 behind a prompt of 40; must be at most 8",
    ),
    ({"max_tokens": 41}, 400, "max_tokens", "max_tokens: 41; must be at most 40 on this server"),
    ({"max_tokens": 0}, 400, "max_tokens", "max_tokens: 0; "),
    ({"max_tokens": "5"}, 400, "max_tokens", "max_tokens: '5'; "),
    ({"max_tokens": True}, 400, "max_tokens", "max_tokens: True; "),
    ({"temperature": -1}, 400, "temperature", "temperature: -1; "),
    (b'{"temperature": NaN}', 400, "temperature", "temperature: nan; "),
    (b'{"temperature": 1e999}', 400, "temperature", "temperature: inf; "),
    ({"top_p": 0}, 400, "top_p", "top_p: 0; "),
    ({"top_p": 1.5}, 400, "top_p", "top_p: 1.5; "),
    ({"top_k": 0}, 400, "top_k", "top_k: 0; "),
    ({"seed": 2**63}, 400, "seed", "seed: 9223372036854775808; "),
    ({"n": 5}, 400, "n", "n: 5, with 1 prompts; must be 4 texts at most"),
    ({"prompt": ["a"] * 5}, 400, "n", "n: 1, with 5 prompts; must be 4 texts at most"),
    ({"stop": ["a"] * 5}, 400, "stop", "must be at most 4 strings, none of them empty"),
    ({"stop": ""}, 400, "stop", "stop: ''; must be"),
    ({"stop": 7}, 400, "stop", "stop: 7; "),
    ({"echo": True}, 400, "echo", "echo: True is not supported here; must be unset or False"),
    ({"logprobs": 1}, 400, "logprobs", "logprobs: 1 is not supported here; must be unset"),
    ({"suffix": "x"}, 400, "suffix", "suffix: 'x' is not supported here"),
    ({"best_of": 2}, 400, "best_of", "best_of: 2 is not supported here; must be unset or 1"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "presence_penalty: 0.5 is not supported here"),
    ({"frequency_penalty": False}, 400, "frequency_penalty", "frequency_penalty: False is not supported here"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "logit_bias: {'5': 1} is not supported here; must be unset or {}"),
]


@pytest.mark.parametrize(("body", "status", "param", "message"), REFUSED)
def test_what_cannot_be_answered_is_refused(server, body, status, param, message) -> None:
    got, answer = server.post(COMPLETIONS, body)
    error = answer["error"]
    assert (got, error["param"]) == (status, param) and message in error["message"], answer
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_values_that_change_nothing_are_taken(server) -> None:
    neutral = {
        "echo": False, "logprobs": None, "suffix": None, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0,
        "logit_bias": {}, "user": "me", "n": 1, "stream": False, "stop": None, "top_p": 1, "seed": None,
    }  # fmt: skip
    assert server.post(COMPLETIONS, {"prompt": "a", **neutral})[0] == 200


def test_paths_methods_and_kinds_of_bodies(server) -> None:
    assert server.get("/v1/models")[1]["data"][0]["id"] == "small"
    # A client has its answer before the place is free.
    server.until_idle()
    assert server.get("/health") == (200, {"status": "ok", "model": "small", "running": 0, "waiting": 0})
    status, page = server.get("/")
    assert status == 200 and "<textarea" in page and "http" not in page.replace("http-equiv", "")
    assert server.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert server.get("/v1/nothing")[1]["error"]["message"] == "GET /v1/nothing: Not Found"
    status, answer = server.get(COMPLETIONS)
    assert status == 405 and server.headers["Allow"] == "POST" and answer["error"]["message"].endswith("Not Allowed")
    # A page of another site may send text, and may have a name of its own point here.
    status, answer = server.ask("POST", COMPLETIONS, b"{}", {"Content-Type": "text/plain"})
    assert status == 415 and answer["error"]["message"] == "Content-Type: must be application/json"
    status, answer = server.post(COMPLETIONS, {}, Host="evil.example:80")
    assert status == 421 and "must be one of" in answer["error"]["message"]
    assert server.get("/health", Host="localhost")[0] == server.get("/health", Host="[::1]:8000")[0] == 200


def test_a_key_is_asked_for(served, monkeypatch) -> None:
    with running(served, LIMITS, api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            status, answer = server.post(COMPLETIONS, {}, **headers)
            assert status == 401 and answer["error"]["code"] == "invalid_api_key"
            assert "secret" not in json.dumps(answer)
        assert server.get("/v1/models")[0] == 401 and server.get("/health")[0] == server.get("/")[0] == 200
        assert server.post(COMPLETIONS, {"prompt": "a"}, Authorization="Bearer secret")[0] == 200
    # Paths are those of the routes, whatever a client calls the host: older Starlette builds `url` from its words.
    monkeypatch.setattr(Request, "url", property(lambda request: URL("http://x/y?/v1/completions")))
    with running(served, LIMITS, api_key="secret", hosts=None) as server:
        for host in ("x/y?", "x/#", "somewhere"):
            assert server.post(COMPLETIONS, {"prompt": "a"}, Host=host)[0] == 401


def test_a_long_conversation_is_refused_before_it_is_rendered(served) -> None:
    with running(served, replace(LIMITS, body_bytes=20_000)) as server:
        status, answer = server.post(CHAT, {"messages": [{"role": "assistant", "content": ""}] * 257})
    assert status == 400 and answer["error"]["param"] == "messages" and "256" in answer["error"]["message"]


def test_time_counts_from_the_arrival_of_a_request(served, monkeypatch) -> None:
    monkeypatch.setattr(Served, "prompts", lambda self, prompt: time.sleep(1.0) or [[97]])
    with running(served, replace(LIMITS, seconds=0.5)) as server:
        status, answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1})
    assert status in (503, 504) and answer["error"]["code"] == "time_limit"


def test_connections_that_ask_for_nothing_are_closed(served, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 1.0)
    with running(served, LIMITS) as server, contextlib.ExitStack() as stack:
        half = b"POST /v1/completions HTTP/1.1\r\nHost: loc"
        for begun in (b"", half, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + half):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30))
            silent.sendall(begun)
            while silent.recv(4096):
                pass
        # One that waits for its text stays.
        with Gate(served.trained.model) as gate:
            connection = server.open_stream({"prompt": "a", "max_tokens": 2, "temperature": 0})
            time.sleep(2.5)
            gate.open()
            assert text_of(list(events(connection.getresponse()))) == expected(served, "a", 2, temperature=0)
            connection.close()


def test_more_than_the_queue_holds_is_refused_and_taken_later(server, served) -> None:
    with Gate(served.trained.model) as gate, contextlib.ExitStack() as stack:
        for _ in range(6):
            connection = server.open_stream({"prompt": "a", "max_tokens": 30, "temperature": 0})
            stack.callback(connection.close)
        until(lambda: server.api.worker.num_streams == 6)
        status, answer = server.post(COMPLETIONS, {"prompt": "a"})
        assert status == 503 and int(server.headers["Retry-After"]) >= 1
        assert answer["error"]["type"] == "overloaded_error" and answer["error"]["code"] == "queue_full"
        # The event loop answers while the model computes.
        assert server.get("/health")[1]["running"] <= 4
        stack.close()
        gate.open()
        server.until_idle()
    assert server.post(COMPLETIONS, {"prompt": "a"})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_place_at_the_next_step(server, served, stream) -> None:
    with Gate(served.trained.model) as gate:
        connection = server.connection()
        body = json.dumps({"prompt": "a", "max_tokens": 40, "stream": stream})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        gate.let(3)
        until(lambda: len(gate.evaluated) == 3)
        (open_one,) = server.api.batch.running
        connection.close()
        until(lambda: open_one.stream.cancelled)
        gate.let(1)
        until(lambda: server.get("/health")[1]["running"] == 0)
        # At most the pass that had begun when the client went.
        assert len(gate.evaluated) in (3, 4) and server.api.batch.cache_bytes == 0


def test_time_runs_out(served) -> None:
    with running(served, Limits(streams=1, seconds=0.2)) as server, Gate(served.trained.model) as gate:
        gate.let(2)
        connection = server.open_stream({"prompt": "a", "max_tokens": 40})
        found = events(connection.getresponse())
        until(lambda: len(gate.evaluated) == 2)
        time.sleep(0.3)
        gate.open()
        last = list(found)[-1]
        connection.close()
        assert last["error"]["code"] == "time_limit" and "of at most 40 tokens after 0.2 s" in last["error"]["message"]
    with running(served, Limits(streams=1, seconds=0.2)) as server, Gate(served.trained.model) as gate:
        threading.Timer(0.5, gate.open).start()
        status, answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 40})
        assert status == 504 and answer["error"]["code"] == "time_limit"


def test_32_streams_of_which_one_in_four_hangs_up(served) -> None:
    """All others get the text that they get alone; slots, tasks, threads and keys and values come back."""
    bodies = [{"prompt": f"{number:02d}", "max_tokens": 30, "seed": number, "top_k": 50} for number in range(32)]
    texts: dict[int, str] = {}
    with running(served, Limits(streams=24, queue=32)) as server:
        assert server.post(COMPLETIONS, bodies[0])[0] == 200
        server.until_idle()
        threads, tasks = threading.active_count(), server.tasks_at_rest()

        def client(number: int) -> None:
            with contextlib.closing(server.open_stream(bodies[number])) as connection:
                found = events(connection.getresponse())
                if number % 4 == 0:
                    next(found)
                else:
                    texts[number] = text_of(list(found))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(32)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(120)
            assert not thread.is_alive()
        server.until_idle()
        batch = server.api.batch
        assert batch.running == [] and not batch.waiting and batch.cache_bytes == 0
        until(lambda: server.num_tasks() == tasks)
        gc.collect()
        assert not [found for found in gc.get_objects() if isinstance(found, Exchange | Running)]
        # Threads that encode prompts are kept by asyncio, at most 32 and 4 more.
        assert threading.active_count() <= threads + 36
        assert server.post(COMPLETIONS, bodies[0])[0] == 200
    assert set(texts) == {number for number in range(32) if number % 4}
    for number, text in texts.items():
        body = bodies[number]
        assert text == expected(served, body["prompt"], 30, seed=number, temperature=1.0), number


@pytest.mark.parametrize("grace_seconds", [60, 0])
def test_texts_have_their_time_when_the_server_ends(served, grace_seconds) -> None:
    with running(served, LIMITS, grace_seconds=grace_seconds) as server, Gate(served.trained.model) as gate:
        connection = server.open_stream({"prompt": "a", "max_tokens": 30, "seed": 0, "top_k": 50})
        found = events(connection.getresponse())
        gate.let(5)
        until(lambda: len(gate.evaluated) == 5)
        server.server.should_exit = True
        if grace_seconds == 0:
            until(lambda: server.api.worker.stopping)
        gate.open()
        told = list(found)
        connection.close()
        if grace_seconds:
            assert told[-1] == "[DONE]" and text_of(told) == expected(served, "a", 30, temperature=1.0)
        else:
            assert told[-1]["error"]["code"] == "shutting_down"


def test_a_context_that_is_full_ends_the_text(server, served) -> None:
    _, answer = server.post(COMPLETIONS, {"prompt": "a" * (CONTEXT - 3), "temperature": 0})
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["text"] == expected(served, "a" * (CONTEXT - 3), 3, temperature=0)


def test_chat_without_a_template_is_refused(server) -> None:
    status, answer = server.post(CHAT, {"messages": [{"role": "user", "content": "Hi"}]})
    assert status == 400 and answer["error"]["code"] == "no_chat_template"
    assert answer["error"]["message"] == "the model's tokenizer has no chat template; must be asked at /v1/completions"


TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Served:
    """A model whose tokenizer has special tokens and a template: letters, and four names."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = write_folder(tmp_path_factory.mktemp("talking") / "talking", "data.tokenizer=huggingface",
                          "data.tokenizer_path=tokenizer.json")  # fmt: skip
    letters = {chr(code): code - 32 for code in range(32, 127)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 95}))
    return open_served(Path(folder), "talker")


def test_chat(talking) -> None:
    messages = [{"role": "user", "content": "Hi<|end|>"}]
    prompt = talking.conversation(messages)
    # What a message spells is text, what the template writes is a token: user, 9 letters, end, assistant.
    assert prompt[0] == 96 and len(prompt) == 12 and prompt[-2:] == [95, 97]
    assert talking.end_tokens == (95,)
    with running(talking, LIMITS) as server:
        body = {"messages": messages, "max_completion_tokens": 10, "seed": 1}
        status, answer = server.post(CHAT, body)
        assert status == 200 and answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant" and answer["usage"]["prompt_tokens"] == 12
        _, completion = server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 10, "seed": 1})
        assert completion["choices"][0]["text"] == choice["message"]["content"]
        found = server.stream(body, CHAT)
        deltas = [event["choices"][0]["delta"] for event in found[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
        assert found[-1] == "[DONE]" and [delta.get("role") for delta in deltas][:2] == ["assistant", None]
        assert {event["object"] for event in found[:-1]} == {"chat.completion.chunk"}
        for wrong, param, message in (
            ({}, "messages", "messages: must be given"),
            ({"messages": "Hi"}, "messages", "messages: 'Hi'; "),
            ({"messages": []}, "messages", "messages: must be at least one"),
            ({"messages": [{"role": "user"}]}, "messages", "must have a role and a content, both text"),
            ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages", "messages[0]: name: "),
            ({"messages": messages, "tools": [{}]}, "tools", "tools: [{}] is not supported here"),
            ({**body, "max_completion_tokens": 41}, "max_completion_tokens", "max_completion_tokens: 41; must be"),
            ({**body, "max_tokens": 3}, "max_tokens", "max_tokens: only without max_completion_tokens"),
        ):
            status, answer = server.post(CHAT, wrong)
            assert (status, answer["error"]["param"]) == (400, param) and message in answer["error"]["message"], answer
