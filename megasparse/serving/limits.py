"""How much a server takes on: every bound in one place, with its default."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds of a server. Raises ValueError for one that is out of range.

    Attributes:
        streams: texts that are written at once; one request asks for at most so many.
        queue: texts that wait for a place; a request beyond them is refused with status 503.
        tokens: `max_tokens` of a request at most.
        seconds: from the arrival of a request to its last token.
        stalled_seconds: in which a client reads nothing of what waits for it; its connection is closed then.
        body_bytes: body of a request.
        cache_bytes: keys and values of all texts that are written at once.
        prefill_tokens: prompt tokens evaluated between two tokens of the running texts, one prompt at least.
    """

    streams: int = 32
    queue: int = 64
    tokens: int = 4096
    seconds: float = 300.0
    stalled_seconds: float = 60.0
    body_bytes: int = 1 << 20
    cache_bytes: int = 1 << 30
    prefill_tokens: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "queue" else 1 if isinstance(field.default, int) else 0.001
            if not least <= value < float("inf"):
                raise ValueError(f"{field.name}: {value}; must be at least {least}, and finite")
