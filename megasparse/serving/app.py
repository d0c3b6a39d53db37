"""The HTTP interface: OpenAI's completions and chat completions, the models, the health, and a page to type into.

    app = build_app(served, Limits(), api_key=None, hosts=LOOPBACK)

The model computes in a thread of its own, which begins and ends with the application. Texts are encoded in further
threads, so that the event loop never waits.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from megasparse.serving.batch import Batch
from megasparse.serving.errors import AUTHENTICATION, SERVER, RequestError
from megasparse.serving.exchange import Exchange, ExchangeResponse, error_response, json_response
from megasparse.serving.limits import Limits
from megasparse.serving.protocol import ChatRequest, CompletionRequest, GenerationRequest, Header, parsed
from megasparse.serving.served import Served
from megasparse.serving.stream import Sampling
from megasparse.serving.worker import Worker

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names by which a browser on this machine asks for it; not so the page of a site that has its own name point here."""

COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for completions; a chat goes on to the end of the context, or the server's limit."""

BODY_SECONDS = 30
"""For sending a body."""

PAGE = Path(__file__).with_name("page.html")
INLINE = "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
PAGE_POLICY = f"default-src 'none'; img-src data:; connect-src 'self'; {INLINE}"
"""The page brings its style and its script along, and asks nobody but this server."""

Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """What the routes share. api_key: asked for at /v1/; None: nobody is. hosts: names of this server; None: any."""

    def __init__(self, served: Served, limits: Limits, api_key: str | None, hosts: Collection[str] | None) -> None:
        self.served, self.limits, self._key, self._hosts = served, limits, api_key, hosts
        trained = served.trained
        self.batch = Batch(trained.model, trained.tokenizer, limits, served.end_tokens)
        self.worker = Worker(self.batch)
        self.created = int(time.time())

    def guarded(self, handler: Handler) -> Handler:
        """The handler behind the checks of host and key, with errors as answers."""

        async def answer(request: Request) -> Response:
            try:
                self._check_host(request)
                # As the routes do: `request.url` may follow the client's Host header.
                if request.scope["path"].startswith("/v1/"):
                    self._check_key(request)
                return await handler(request)
            except RequestError as error:
                return error_response(error)

        return answer

    async def completions(self, request: Request) -> Response:
        deadline = time.monotonic() + self.limits.seconds
        wanted = parsed(CompletionRequest, await self._read_json(request), self.limits)
        self._check_model(wanted)
        prompts = await asyncio.to_thread(self.served.prompts, wanted.prompt)
        return self._answer("text_completion", wanted, prompts, COMPLETION_TOKENS, deadline)

    async def chat(self, request: Request) -> Response:
        deadline = time.monotonic() + self.limits.seconds
        wanted = parsed(ChatRequest, await self._read_json(request), self.limits)
        self._check_model(wanted)
        prompt = await asyncio.to_thread(self.served.conversation, wanted.messages)
        return self._answer("chat.completion", wanted, [prompt], self.limits.tokens, deadline)

    async def models(self, request: Request) -> Response:
        model = {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "megasparse"}
        return json_response({"object": "list", "data": [model]})

    async def health(self, request: Request) -> Response:
        """Running and waiting texts, for whoever watches the server."""
        running, open_streams = len(self.batch.running), self.worker.num_streams
        waiting = max(open_streams - running, 0)
        return json_response({"status": "ok", "model": self.served.name, "running": running, "waiting": waiting})

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-store"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    def _answer(
        self, kind: str, wanted: GenerationRequest, prompts: list[list[int]], default: int, deadline: float
    ) -> Response:
        """default: of the number of tokens. deadline: by the monotonic clock, from the arrival of the request."""
        choices = wanted.n or 1
        if len(prompts) * choices > self.limits.streams:
            message = f"n: {choices}, with {len(prompts)} prompts; must be {self.limits.streams} texts at most"
            raise RequestError(message, param="n", code="too_many_choices")
        # As generate.py numbers its samples. A client that names no seed gets another text each time.
        seed = secrets.randbits(62) if wanted.seed is None else wanted.seed
        streams = [
            (prompt, self._sampling(wanted, prompt, seed + number, default))
            for prompt in prompts
            for number in range(choices)
        ]
        prompt_tokens = sum(map(len, prompts))
        exchange = Exchange(self.worker, streams, prompt_tokens, deadline)
        include_usage = wanted.stream_options is not None and wanted.stream_options.include_usage
        header = Header.new(kind, self.served.name)
        return ExchangeResponse(exchange, header, stream=bool(wanted.stream), include_usage=include_usage)

    def _sampling(self, wanted: GenerationRequest, prompt: list[int], seed: int, default: int) -> Sampling:
        context = self.served.context
        room = context - len(prompt)
        param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
        if room < 1:
            message = f"{param}: {len(prompt)} tokens; must be fewer than the model's context of {context}"
            raise RequestError(message, param=param, code="context_length_exceeded")
        field, asked = wanted.asked_tokens
        if asked is not None and asked > room:
            message = (
                f"{field}: {asked} behind a prompt of {len(prompt)}; must be at most {room}, as the model's context"
            )
            raise RequestError(f"{message} has {context} tokens", param=field, code="context_length_exceeded")
        return Sampling(
            max_tokens=min(default, self.limits.tokens, room) if asked is None else asked,
            temperature=1.0 if wanted.temperature is None else wanted.temperature,
            top_p=wanted.top_p,
            top_k=wanted.top_k,
            seed=seed,
            stop=wanted.stops,
        )

    async def _read_json(self, request: Request) -> Any:
        # Also: a page of another site can send text unasked, but JSON only where this server permits it.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            message = "Content-Type: must be application/json"
            raise RequestError(message, status=415, code="unsupported_media_type")
        limit, body = self.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        message = f"the body has more than {limit} bytes, the most that this server reads"
                        raise RequestError(message, status=413, code="body_too_large")
        except TimeoutError:
            message = f"the body did not come within {BODY_SECONDS} s"
            raise RequestError(message, status=408, code="body_too_slow") from None
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from None

    def _check_model(self, wanted: GenerationRequest) -> None:
        if wanted.model not in (None, self.served.name):
            message = f"model: {wanted.model!r:.80}; must be {self.served.name!r}"
            raise RequestError(message, status=404, param="model", code="model_not_found")

    def _check_host(self, request: Request) -> None:
        name = request.headers.get("host", "").rpartition(":")
        host = name[0] if name[0] and name[2].isdecimal() else request.headers.get("host", "")
        if self._hosts is not None and host.lower() not in self._hosts:
            message = f"Host: {host!r:.80}; must be one of {', '.join(sorted(self._hosts))}"
            raise RequestError(message, status=421, code="wrong_host")

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            message = "Authorization: must be `Bearer KEY` with the key of this server"
            raise RequestError(message, status=401, kind=AUTHENTICATION, code="invalid_api_key")


def build_app(
    served: Served, limits: Limits, *, api_key: str | None = None, hosts: Collection[str] | None = LOOPBACK
) -> Starlette:
    """The application; `app.state.api` holds what its routes share. Raises ValueError for limits that do not hold one
    text of the whole context."""
    api = Api(served, limits, api_key, hosts)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        api.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(api.worker.stop)

    routes = [
        Route("/", api.guarded(api.page)),
        Route("/health", api.guarded(api.health)),
        Route("/v1/models", api.guarded(api.models)),
        Route("/v1/completions", api.guarded(api.completions), methods=["POST"]),
        Route("/v1/chat/completions", api.guarded(api.chat), methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, ClientDisconnect: _gone, Exception: _failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    app.state.api = api
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path:.80}: {error.detail}"
    response = error_response(RequestError(message, status=error.status_code, code="not_found"))
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: Exception) -> Response:
    """The client went while it sent; nobody reads this."""
    return Response(status_code=400)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of this server; its traceback is in the log."""
    return error_response(RequestError("the server failed", status=500, kind=SERVER, code="internal_error"))
