"""One text that the model writes for a client: what was asked, and what is told of it while it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megasparse.serving.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, as in ``generate``; and where the text ends.

    seed: of a generator of its own, so that a text does not depend on those beside it. stop: strings, none empty.
    """

    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """New text of a stream. The last part has a finish reason, `stop` or `length`, or an error.

    num_tokens: drawn so far, the one that ended the text included.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None
    error: RequestError | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


class Stream:
    """tell: takes each part, in the thread that computes; it must not block.

    deadline: in `time.monotonic()`. Whoever wants no more of it calls ``cancel``, from any thread: the stream leaves
    the batch before the next token, and nothing more is told.
    """

    def __init__(
        self, prompt_ids: Sequence[int], sampling: Sampling, tell: Callable[[Part], None], deadline: float
    ) -> None:
        assert prompt_ids and sampling.max_tokens >= 1
        self.prompt_ids, self.sampling, self.tell, self.deadline = list(prompt_ids), sampling, tell, deadline
        self.cancelled = False

    @property
    def max_length(self) -> int:
        """Tokens that it may have, prompt and text."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    def cancel(self) -> None:
        self.cancelled = True
