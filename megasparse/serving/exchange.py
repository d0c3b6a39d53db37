"""One request while it is answered: its streams, their parts as they come, and a client who may go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from megasparse.serving.errors import RequestError
from megasparse.serving.protocol import Header, chunk_object, usage_chunk, usage_object, whole_object
from megasparse.serving.stream import Part, Sampling, Stream
from megasparse.serving.worker import Worker


class Exchange:
    """The streams of one request, submitted at once. Raises RequestError where there is no place for them."""

    def __init__(
        self, worker: Worker, wanted: Sequence[tuple[list[int], Sampling]], prompt_tokens: int, deadline: float
    ) -> None:
        loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self.prompt_tokens = prompt_tokens

        def tell(index: int, part: Part) -> None:
            # A loop that is closed has nobody left to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._parts.put_nowait, (index, part))

        self.streams = [
            Stream(ids, sampling, partial(tell, index), deadline) for index, (ids, sampling) in enumerate(wanted)
        ]
        worker.submit(self.streams)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Number of the choice and part, until all have ended. An error in one ends all, and is raised."""
        left = len(self.streams)
        try:
            while left:
                index, part = await self._parts.get()
                left -= part.is_last
                yield index, part
                if part.error is not None:
                    raise part.error
        finally:
            self.cancel()

    def cancel(self) -> None:
        for stream in self.streams:
            stream.cancel()

    async def whole(self, header: Header) -> dict[str, Any]:
        """The answer at once."""
        texts = [""] * len(self.streams)
        reasons, counts = [""] * len(texts), [0] * len(texts)
        async for index, part in self.parts():
            texts[index] += part.text
            reasons[index], counts[index] = part.finish_reason or "", part.num_tokens
        usage = usage_object(self.prompt_tokens, sum(counts))
        return whole_object(header, list(zip(texts, reasons, strict=True)), usage)

    async def events(self, header: Header, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events, `[DONE]` last; an error takes its place."""
        counts = [0] * len(self.streams)
        begun: set[int] = set()
        try:
            async for index, part in self.parts():
                counts[index] = part.num_tokens
                if part.text or part.error is None:
                    chunk = chunk_object(header, index, part.text, part.finish_reason, first=index not in begun)
                    begun.add(index)
                    yield event(chunk)
        except RequestError as error:
            yield event(error.body())
            return
        if include_usage:
            yield event(usage_chunk(header, usage_object(self.prompt_tokens, sum(counts))))
        yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    return f"data: {encoded(value).decode()}\n\n"


def encoded(value: Any) -> bytes:
    """JSON in UTF-8. What a message quotes of a client may be half of a surrogate pair, which JSON can only escape."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="backslashreplace")


class ExchangeResponse(Response):
    """Answers an exchange as JSON or as events, and ends it as soon as the client goes, waiting or not."""

    def __init__(self, exchange: Exchange, header: Header, *, stream: bool, include_usage: bool) -> None:
        super().__init__()
        self._exchange, self._header, self._stream, self._include_usage = exchange, header, stream, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = asyncio.ensure_future(self._send_events(send) if self._stream else self._send_whole(scope, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            self._exchange.cancel()
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        headers = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store"}
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        async for text in self._exchange.events(self._header, self._include_usage):
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_whole(self, scope: Scope, send: Send) -> None:
        try:
            response = json_response(await self._exchange.whole(self._header))
        except RequestError as error:
            response = error_response(error)
        await response(scope, _nothing, send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    raise AssertionError("the body has been read")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(value), status, headers, media_type="application/json")


def error_response(error: RequestError) -> Response:
    return json_response(error.body(), error.status, error.headers())
