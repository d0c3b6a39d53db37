"""Continuous batching: texts join a running batch and leave it between two tokens.

    batch = Batch(model, tokenizer, limits, end_tokens={0})
    batch.waiting.append(Stream(prompt_ids, sampling, tell=print, deadline=time.monotonic() + 60))
    while batch.num_streams:
        batch.step()

A step gives every running text one token, in one forward pass, then lets waiting ones in, each with a pass over its
prompt. A text has its own keys and values, its own generator and its own attention; only products with weights are
shared, row by row. So its tokens do not depend on the others but for the rounding of sums in another order.
Memory: a text is let in when the keys and values of its longest form fit into the budget.
Tensor names: S running texts, T tokens of a prompt, V entries of the vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

import torch

from megasparse.data.tokenizer import Tokenizer
from megasparse.inference.generation import choose
from megasparse.inference.growing_text import GrowingText
from megasparse.layers import JoinedCaches, KeyValueCache
from megasparse.models.gpt import GPT
from megasparse.serving.errors import OVERLOADED, SERVER, RequestError
from megasparse.serving.limits import Limits
from megasparse.serving.stream import Part, Stream


class Running:
    """A stream with a place in the batch."""

    def __init__(self, stream: Stream, model: GPT, tokenizer: Tokenizer) -> None:
        self.stream = stream
        self.cache = KeyValueCache(model.config.num_layers, stream.max_length)
        self.text = GrowingText(tokenizer, stream.prompt_ids, stream.sampling.stop)
        self.generator = torch.Generator().manual_seed(stream.sampling.seed)
        self.num_tokens, self.last_token = 0, -1


class Batch:
    """For one thread; only ``Stream.cancel`` may come from others.

    Args:
        model: in evaluation mode.
        tokenizer: only tokens that it has are drawn.
        limits: `streams`, `cache_bytes` and `prefill_tokens` count here.
        end_tokens: those that end a text.
        now: the clock of the deadlines.

    Raises ValueError where the budget does not hold one text of the model's whole context.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        limits: Limits,
        end_tokens: Collection[int],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        assert model.token_multiple == 1, "one process serves"
        self.model, self.tokenizer, self.limits, self._now = model, tokenizer, limits, now
        self._ends = frozenset(end_tokens)
        self.waiting: deque[Stream] = deque()
        self.running: list[Running] = []
        weight = next(model.parameters())
        self._device = weight.device
        config = model.config
        heads = config.num_layers * config.key_value_heads
        self.token_bytes = 2 * heads * config.head_dim * weight.element_size()
        """Keys and values of a token."""
        if config.seq_length * self.token_bytes > limits.cache_bytes:
            raise ValueError(
                f"cache_bytes: {limits.cache_bytes}; must be at least {config.seq_length * self.token_bytes}, for one "
                f"text of the model's {config.seq_length} tokens"
            )

    @property
    def num_streams(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def cache_bytes(self) -> int:
        """Keys and values that the running texts may take."""
        return sum(running.stream.max_length for running in self.running) * self.token_bytes

    @torch.no_grad()
    def step(self) -> None:
        """A token for each running text; then waiting ones join."""
        self._sweep()
        if self.running:
            self._decode()
        budget = self.limits.prefill_tokens
        while self.waiting and self._fits(self.waiting[0]) and budget > 0:
            stream = self.waiting.popleft()
            budget -= len(stream.prompt_ids)
            self._join(stream)

    def end_all(self, error: RequestError) -> None:
        """End every stream with an error."""
        for stream in [*(running.stream for running in self.running), *self.waiting]:
            _tell_error(stream, error, 0)
        self.running.clear()
        self.waiting.clear()

    def _fits(self, stream: Stream) -> bool:
        needed = stream.max_length * self.token_bytes
        return len(self.running) < self.limits.streams and self.cache_bytes + needed <= self.limits.cache_bytes

    def _sweep(self) -> None:
        """Let go of those that nobody waits for, or that have taken too long."""
        now, seconds = self._now(), f"{self.limits.seconds:g} s"
        for running in list(self.running):
            if running.stream.deadline <= now:
                asked = running.stream.sampling.max_tokens
                message = f"{running.num_tokens} of at most {asked} tokens after {seconds}, the limit of this server"
                error = RequestError(f"{message}; ask for fewer", status=504, kind=SERVER, code="time_limit")
                self._end(running, error=error)
        for stream in self.waiting:
            if stream.deadline <= now:
                message = f"no place was free within {seconds}"
                error = RequestError(message, status=503, kind=OVERLOADED, code="time_limit", retry_after=5)
                _tell_error(stream, error, 0)
                stream.cancel()
        self.running = [running for running in self.running if not running.stream.cancelled]
        if any(stream.cancelled for stream in self.waiting):
            kept = [stream for stream in self.waiting if not stream.cancelled]
            self.waiting.clear()
            self.waiting.extend(kept)

    def _join(self, stream: Stream) -> None:
        running = Running(stream, self.model, self.tokenizer)
        self.running.append(running)
        prompt_1T = torch.tensor([stream.prompt_ids], device=self._device)
        logits_1V = self.model(prompt_1T, cache=running.cache, last_only=True)[:, 0].float()
        running.cache.advance(len(stream.prompt_ids))
        self._take(running, logits_1V)

    def _decode(self) -> None:
        members = list(self.running)
        tokens_1S = torch.tensor([[running.last_token for running in members]], device=self._device)
        caches = JoinedCaches([running.cache for running in members])
        logits_SV = self.model(tokens_1S, cache=caches)[0].float()
        for running, logits_1V in zip(members, logits_SV.split(1), strict=True):
            running.cache.advance(1)
            self._take(running, logits_1V)

    def _take(self, running: Running, logits_1V: torch.Tensor) -> None:
        """Draw the next token of a text and tell what it shows."""
        wanted = running.stream.sampling
        known = logits_1V[:, : self.tokenizer.vocab_size]
        token = int(choose(known, wanted.temperature, wanted.top_k, wanted.top_p, running.generator))
        running.last_token, running.num_tokens = token, running.num_tokens + 1
        if token in self._ends:
            self._end(running, "stop")
            return
        shown = running.text.add(token)
        if running.text.stopped:
            self._end(running, "stop", shown)
        elif running.num_tokens == wanted.max_tokens:
            self._end(running, "length", shown)
        elif shown:
            running.stream.tell(Part(shown, running.num_tokens))

    def _end(
        self, running: Running, reason: str | None = None, shown: str = "", error: RequestError | None = None
    ) -> None:
        held = running.text.finish()
        if running.text.stopped:
            # What was held back until the end may hold a stop string, too.
            reason = "stop" if reason else None
        if not running.stream.cancelled:
            running.stream.tell(Part(shown + held, running.num_tokens, reason, error))
        self.running.remove(running)


def _tell_error(stream: Stream, error: RequestError, num_tokens: int) -> None:
    if not stream.cancelled:
        stream.tell(Part("", num_tokens, error=error))
