"""Requests and answers in the form of OpenAI's interface: which fields there are, and which values they may have.

    wanted = parsed(CompletionRequest, values, limits)        # RequestError names the field
    completion_object(header, choices, usage)

A field that this server does not know is refused, and so is one that would change the text and is not supported.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megasparse.serving.errors import RequestError
from megasparse.serving.limits import Limits

MOST_STOPS = 4
"""As OpenAI's interface has it."""
MOST_MESSAGES = 256
"""Of a conversation: a template is rendered for each answer in it, with all that came before."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of requests have. `top_k` is no field of OpenAI's; others that serve models have it, too."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    # Values that change nothing; any other is refused, so that nobody takes an answer for what it is not.
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "logit_bias": (None, {}),
        "presence_penalty": (None, 0),
        "frequency_penalty": (None, 0),
    }

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        """The field and its value."""
        return "max_tokens", self.max_tokens


class CompletionRequest(GenerationRequest):
    """`prompt`: text, a list of texts, token ids, or a list of lists of them; checked where it is encoded."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.NEUTRAL,
        "echo": (None, False),
        "logprobs": (None,),
        "suffix": (None, ""),
        "best_of": (None, 1),
    }

    prompt: Any = None
    echo: Any = None
    logprobs: Any = None
    suffix: Any = None
    best_of: Any = None


class ChatRequest(GenerationRequest):
    """`messages`: objects with `role` and `content`, both text."""

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.NEUTRAL,
        "logprobs": (None, False),
        "top_logprobs": (None, 0),
        "tools": (None, []),
        "tool_choice": (None, "none"),
        "response_format": (None, {"type": "text"}),
    }

    messages: list[dict[str, Any]] = Field(max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Any = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    response_format: Any = None

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return name, getattr(self, name)


Request = TypeVar("Request", bound=GenerationRequest)


def parsed(kind: type[Request], values: Any, limits: Limits) -> Request:
    """The request that a JSON body holds. Raises RequestError, which names field, value and what it must be."""
    if not isinstance(values, dict):
        raise RequestError("the body must be a JSON object")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _named(error.errors()[0]) from None
    for name, neutral in kind.NEUTRAL.items():
        value = getattr(request, name)
        # True equals 1, but is no number here.
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral):
            allowed = " or ".join("unset" if known is None else repr(known) for known in neutral)
            raise RequestError(
                f"{name}: {value!r} is not supported here; must be {allowed}", param=name, code="unsupported_value"
            )
    _check_together(request, limits)
    return request


def _check_together(request: GenerationRequest, limits: Limits) -> None:
    field, asked = request.asked_tokens
    if asked is not None and asked > limits.tokens:
        message = f"{field}: {asked}; must be at most {limits.tokens} on this server"
        raise RequestError(message, param=field, code="max_tokens_too_large")
    if len(request.stops) > MOST_STOPS or "" in request.stops:
        message = f"stop: {request.stop!r}; must be at most {MOST_STOPS} strings, none of them empty"
        raise RequestError(message, param="stop", code="invalid_value")
    if field != "max_tokens" and request.max_tokens is not None:
        raise RequestError(f"max_tokens: only without {field}", param="max_tokens", code="invalid_value")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options: only with stream=true", param="stream_options", code="invalid_value")


def _named(error: Mapping[str, Any]) -> RequestError:
    # Of a field with several types pydantic names the type as well.
    name = str(error["loc"][0]) if error["loc"] else None
    if error["type"] == "extra_forbidden":
        field = ".".join(map(str, error["loc"]))
        return RequestError(f"{field}: this server does not know the field", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        return RequestError(f"{name}: must be given", param=name, code="missing_required_parameter")
    shown = f"{error['input']!r:.80}"
    return RequestError(f"{name}: {shown}; {error['msg']}", param=name, code="invalid_value")


@dataclass(frozen=True)
class Header:
    """What all objects of an answer begin with. kind: `text_completion`, `chat.completion`."""

    id: str
    kind: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, model: str) -> Header:
        prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
        return cls(f"{prefix}-{secrets.token_hex(12)}", kind, int(time.time()), model)

    @property
    def is_chat(self) -> bool:
        return self.kind.startswith("chat")

    def fields(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage_object(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def whole_object(header: Header, texts: Sequence[tuple[str, str]], usage: Mapping[str, int]) -> dict[str, Any]:
    """The answer at once. texts: of each choice, with its finish reason."""
    choices = []
    for index, (text, reason) in enumerate(texts):
        content = {"message": {"role": "assistant", "content": text}} if header.is_chat else {"text": text}
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": reason})
    return {**header.fields(header.kind), "choices": choices, "usage": dict(usage)}


def chunk_object(header: Header, index: int, text: str, reason: str | None, *, first: bool) -> dict[str, Any]:
    """A piece of a choice. first: of this choice."""
    kind = f"{header.kind}.chunk" if header.is_chat else header.kind
    if header.is_chat:
        role = {"role": "assistant"} if first else {}
        content: dict[str, Any] = {"delta": {**role, **({"content": text} if text or first else {})}}
    else:
        content = {"text": text}
    return {
        **header.fields(kind),
        "choices": [{"index": index, **content, "logprobs": None, "finish_reason": reason}],
    }


def usage_chunk(header: Header, usage: Mapping[str, int]) -> dict[str, Any]:
    """The last chunk where the client asked for the counts."""
    kind = f"{header.kind}.chunk" if header.is_chat else header.kind
    return {**header.fields(kind), "choices": [], "usage": dict(usage)}
