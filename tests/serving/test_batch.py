"""Continuous batching: each text is what it is alone; places, memory and time are bounded, and come back."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from served_models import CONTEXT, SETTINGS, until

from megasparse.config.loader import load_config
from megasparse.data.tokenizer import load_tokenizer
from megasparse.inference.generation import generate
from megasparse.inference.sampling import sample_text
from megasparse.models.build import build_model
from megasparse.serving.batch import Batch
from megasparse.serving.errors import RequestError
from megasparse.serving.limits import Limits
from megasparse.serving.stream import Part, Sampling, Stream
from megasparse.serving.worker import Worker

BYTES = load_tokenizer("bytes")
END = BYTES.end_of_document_id
PROMPTS = ["a", "The cat", "def f(x):", "  ", "0123456789", "été"]


def model_of(*overrides: str):
    config = load_config([], [*SETTINGS, *overrides])
    return build_model(config, 257).eval()


class Told(list):
    """The parts of one stream."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self)

    @property
    def ended(self) -> bool:
        return bool(self) and self[-1].is_last


def stream_of(prompt: str, told: Told | None = None, deadline: float = 1e9, **sampling) -> Stream:
    values = {"max_tokens": 20, "temperature": 0.8, "top_p": None, "top_k": 50, "seed": 0, **sampling}
    tell = (lambda part: None) if told is None else told.append
    return Stream(BYTES.encode(prompt), Sampling(**values), tell, deadline)


def run(batch: Batch) -> None:
    while batch.num_streams:
        batch.step()


def alone(model, prompt: str, **options) -> str:
    values = {"num_tokens": 20, "seed": 0, **options}
    return sample_text(model, BYTES, prompt, **values).removeprefix(prompt)


@pytest.mark.parametrize("style", ["rope", "learned"])
def test_each_text_is_that_of_sampling_alone(style) -> None:
    """Texts join one after the other, at different places and of different lengths, greedy ones and drawn ones."""
    model = model_of(f"model.position_embedding={style}")
    settings = [
        (prompt, temperature, seed, length)
        for number, prompt in enumerate(PROMPTS)
        for temperature, seed, length in ((0.0, 0, 20), (0.8, number, 5 + 3 * number))
    ]
    batch, told = Batch(model, BYTES, Limits(streams=5), {END}), [Told() for _ in settings]
    for (prompt, temperature, seed, length), parts in zip(settings, told, strict=True):
        batch.waiting.append(stream_of(prompt, parts, temperature=temperature, seed=seed, max_tokens=length))
        batch.step()
        assert len(batch.running) <= 5
    run(batch)
    for (prompt, temperature, seed, length), parts in zip(settings, told, strict=True):
        expected = alone(model, prompt, temperature=temperature, seed=seed, num_tokens=length)
        assert parts.text == expected, (prompt, temperature)
        last = parts[-1]
        assert last.finish_reason == "length" and last.num_tokens == length or last.finish_reason == "stop"
    assert batch.cache_bytes == 0


def test_the_end_token_and_stop_strings_end_a_text() -> None:
    model, told = model_of(), [Told(), Told()]
    prompt = torch.tensor([BYTES.encode("The cat")])
    options = {"temperature": 0.8, "top_k": 50, "num_ids": 257}
    drawn = generate(model, prompt, 30, generator=torch.Generator().manual_seed(0), **options)[0, 7:].tolist()
    batch = Batch(model, BYTES, Limits(), {drawn[4], 300})
    batch.waiting.append(stream_of("The cat", told[0], max_tokens=30))
    run(batch)
    first = drawn.index(drawn[4])
    assert told[0][-1].finish_reason == "stop" and told[0][-1].num_tokens == first + 1
    assert told[0].text == BYTES.decode(drawn[:first])
    # Two characters from the middle of the text.
    text = BYTES.decode(drawn)
    stop = text[6:8]
    batch = Batch(model, BYTES, Limits(), ())
    batch.waiting.append(stream_of("The cat", told[1], max_tokens=30, stop=(stop, "not there")))
    run(batch)
    assert told[1].text == text[: text.find(stop)] and told[1][-1].finish_reason == "stop"


def test_a_text_waits_until_its_keys_and_values_fit() -> None:
    model = model_of()
    batch = Batch(model, BYTES, Limits(), {END})
    # 2 layers of 4 heads of 8 float32 numbers, keys and values.
    assert batch.token_bytes == 2 * 2 * 4 * 8 * 4
    batch = Batch(model, BYTES, Limits(cache_bytes=50 * batch.token_bytes), ())
    told = [Told() for _ in range(5)]
    for parts in told:
        batch.waiting.append(stream_of("abcd", parts))
    most = 0
    while batch.num_streams:
        batch.step()
        most = max(most, len(batch.running))
        assert batch.cache_bytes == sum(24 for _ in batch.running) * batch.token_bytes <= batch.limits.cache_bytes
    assert most == 2 and all(parts.ended for parts in told)
    with pytest.raises(ValueError, match=rf"cache_bytes: 9; must be at least {CONTEXT * batch.token_bytes}"):
        Batch(model, BYTES, Limits(cache_bytes=9), ())


def test_a_long_prompt_does_not_bring_others_along() -> None:
    """Prompts of 10, 4 and 3 tokens at 10 tokens a step: one, then two."""
    batch = Batch(model_of(), BYTES, Limits(prefill_tokens=10), ())
    batch.waiting.extend(stream_of(prompt) for prompt in ("0123456789", "abcd", "abc"))
    batch.step()
    assert len(batch.running) == 1
    batch.step()
    assert len(batch.running) == 3


def test_who_goes_frees_the_place_at_the_next_step() -> None:
    batch, told = Batch(model_of(), BYTES, Limits(streams=1), ()), [Told(), Told(), Told()]
    first, second, third = (stream_of("ab", parts) for parts in told)
    batch.waiting.extend((first, second, third))
    batch.step()
    kept = weakref.ref(batch.running[0].cache)
    known = len(told[0])
    first.cancel()
    second.cancel()
    batch.step()
    assert [running.stream for running in batch.running] == [third] and not batch.waiting
    gc.collect()
    assert kept() is None, "its keys and values are still there"
    run(batch)
    assert len(told[0]) == known and not told[1] and told[2].ended


def test_a_text_that_takes_too_long_is_told() -> None:
    clock = [0.0]
    limits = Limits(streams=1, seconds=5)
    batch = Batch(model_of(), BYTES, limits, (), now=lambda: clock[0])
    told = [Told(), Told(), Told()]
    for parts, deadline in zip(told, (5, 5, 7), strict=True):
        batch.waiting.append(stream_of("ab", parts, deadline))
    batch.step()
    batch.step()
    clock[0] = 5.0
    batch.step()
    running, waiting = told[0][-1].error, told[1][-1].error
    assert str(running) == "2 of at most 20 tokens after 5 s, the limit of this server; ask for fewer"
    assert (running.status, running.code) == (504, "time_limit")
    assert str(waiting) == "no place was free within 5 s" and waiting.status == 503 and waiting.retry_after
    run(batch)
    assert told[2][-1].finish_reason == "length"


def test_the_queue_is_bounded_and_a_stop_is_told() -> None:
    worker = Worker(Batch(model_of(), BYTES, Limits(streams=2, queue=1), ()))
    told = [Told() for _ in range(4)]
    streams = [stream_of("ab", parts) for parts in told]
    worker.submit(streams[:2])
    with pytest.raises(RequestError, match="2 texts are being written or wait; this server takes 3, so that 2 more"):
        worker.submit(streams[2:])
    worker.submit(streams[2:3])
    worker.start()
    until(lambda: all(parts.ended for parts in told[:3]))
    until(lambda: worker.num_streams == 0)
    worker.submit(streams[3:])
    worker.stop()
    # It ended before the stop, or because of it.
    assert told[3][-1].finish_reason or told[3][-1].error.code == "shutting_down"
    with pytest.raises(RequestError, match="the server is shutting down"):
        worker.submit([stream_of("ab")])


def test_a_failing_model_ends_its_texts_and_not_the_worker(caplog) -> None:
    model = model_of()
    worker, told = Worker(Batch(model, BYTES, Limits(), ())), [Told(), Told()]

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    hook = model.register_forward_pre_hook(fail)
    worker.start()
    worker.submit([stream_of("ab", told[0])])
    until(lambda: told[0].ended)
    assert told[0] == [Part("", 0, error=told[0][0].error)] and told[0][0].error.status == 500
    assert "no memory" in caplog.text and "no memory" not in str(told[0][0].error)
    hook.remove()
    worker.submit([stream_of("ab", told[1])])
    until(lambda: told[1].ended)
    assert told[1][-1].finish_reason == "length"
    worker.stop()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"streams": 0}, "streams: 0; must be at least 1"),
        ({"queue": -1}, "queue: -1; must be at least 0"),
        ({"seconds": float("nan")}, "seconds: nan; must be at least 0.001, and finite"),
        ({"seconds": float("inf")}, "seconds: inf"),
    ],
)
def test_limits_are_checked(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        Limits(**values)


def test_draws_are_those_of_each_ones_own_generator() -> None:
    """Equal seeds give equal texts in one batch, others do not; the generator of torch plays no part."""
    batch, told = Batch(model_of(), BYTES, Limits(), ()), [Told() for _ in range(3)]
    before = torch.random.get_rng_state()
    for parts, seed in zip(told, (7, 7, 8), strict=True):
        batch.waiting.append(stream_of("ab", parts, seed=seed, deadline=time.monotonic() + 600))
    run(batch)
    assert told[0].text == told[1].text != told[2].text
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_prompt_costs_the_logits_of_its_last_token_alone() -> None:
    model, shapes = model_of(), []
    model.head.register_forward_hook(lambda head, given, found: shapes.append(given[0].shape[1]))
    batch = Batch(model, BYTES, Limits(), ())
    batch.waiting.append(stream_of("a long prompt", max_tokens=2))
    run(batch)
    generate(model, torch.tensor([BYTES.encode("a long prompt")]), 2)
    assert shapes == [1] * 4
