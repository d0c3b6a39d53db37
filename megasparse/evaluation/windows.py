"""Windows: what the model reads at once, and which of its tokens are scored.

    windows = SlidingWindows(tokens, window=1024, stride=512)     # a long text
    window = continuation_window(context_ids, continuation_ids, seq_length=1024)

Every scored token is predicted from all tokens before it in its window, so the first token of a window never is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """tokens: ids, [n]; those from number `first` on (1 <= first < n) are scored."""

    tokens: np.ndarray
    first: int

    @property
    def num_scored(self) -> int:
        return len(self.tokens) - self.first


class SlidingWindows(Sequence[Window]):
    """The windows of a long text, by the rule of Hugging Face's page on the perplexity of fixed-length models.

    Window i begins at token i * stride and has `window` tokens, or what is left; the last one is the first that
    reaches the end of the text. A window scores the tokens that no window before it has held: each is scored once,
    with at least window - stride tokens before it. Token 0 of the text has nothing before it and is not scored. With
    stride = window nothing overlaps, and the first token of no window is scored.

    Args:
        tokens: ids, [n], n >= 2; a memory-mapped file is read window by window.
        window, stride: in tokens, 1 <= stride <= window, window >= 2.
        limit: take the first so many windows only.
    """

    def __init__(self, tokens: np.ndarray, window: int, stride: int, limit: int | None = None) -> None:
        assert len(tokens) >= 2 and window >= 2 and 1 <= stride <= window, (len(tokens), window, stride)
        self.tokens, self.window, self.stride = tokens, window, stride
        count = 1 + max(0, -(-(len(tokens) - window) // stride))
        # Only without overlap can one token be left for the last window: there is nothing to predict it from.
        count -= len(tokens) - (count - 1) * stride == 1
        self._count = count if limit is None else min(count, limit)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:  # type: ignore[override]  # no slices
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} of {self._count}")
        begin = index * self.stride
        held_before = 0 if index == 0 else begin - self.stride + self.window
        return Window(self.tokens[begin : begin + self.window], max(held_before - begin, 1))


def continuation_window(context: Sequence[int], continuation: Sequence[int], seq_length: int) -> Window:
    """Score a continuation after a context of at least one token; of a long context the end is kept.

    The last token is only predicted, never read, so `seq_length` + 1 tokens fit. The continuation must: at most
    seq_length tokens.
    """
    assert context and 1 <= len(continuation) <= seq_length, (len(context), len(continuation), seq_length)
    tokens = np.array([*context, *continuation], np.int64)[-(seq_length + 1) :]
    return Window(tokens, len(tokens) - len(continuation))


def rolling_windows(tokens: Sequence[int], prefix: int, seq_length: int) -> list[Window]:
    """All tokens of a text scored once: windows of `seq_length` predictions, the first after the token `prefix`.

    The last window is moved back until it is full, so that its few tokens have all the context that fits. This is the
    rule of lm-evaluation-harness for a document's likelihood.
    """
    if not len(tokens):
        return []
    stream = np.array([prefix, *tokens], np.int64)
    windows = []
    for begin in range(0, len(tokens), seq_length):
        end = min(begin + seq_length, len(tokens)) + 1
        start = max(0, end - seq_length - 1)
        windows.append(Window(stream[start:end], begin + 1 - start))
    return windows
