"""Perplexity of a text: per token, per byte and per word, and bits per byte.

    task = text_perplexity(original, tokenizer, seq_length=1024, stride=512, detokenizer="wikitext")
    results = task.results(Scorer(model).scores(task.windows))

The negative log-likelihood of the scored tokens is divided by tokens, bytes or words. Bytes and words are those of the
*original* text, before a de-tokenizer, so that models with other tokenizers compare; a word is what stands between
white space. Word-level test sets also count the end of each line as a word: that number is given as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megasparse.config.loader import ConfigError
from megasparse.data import IndexedDataset
from megasparse.data.tokenizer import Tokenizer
from megasparse.evaluation.detokenizers import count_collisions, detokenize
from megasparse.evaluation.windows import SlidingWindows

LARGEST_EXPONENT = 700.0
"""Above it a perplexity is no finite float64."""


@dataclass(frozen=True)
class TextSize:
    """Size of a text in the units that perplexities are given for."""

    bytes: int
    words: int
    line_ends: int

    @classmethod
    def of(cls, text: str) -> TextSize:
        return cls(len(text.encode("utf-8")), len(text.split()), text.count("\n"))

    def __add__(self, other: TextSize) -> TextSize:
        return TextSize(self.bytes + other.bytes, self.words + other.words, self.line_ends + other.line_ends)


@dataclass(frozen=True)
class Perplexity:
    """The windows of a text, and what their scores say."""

    windows: SlidingWindows
    size: Callable[[], TextSize | None]
    """Size of the original text; None where only a part of it is scored."""
    settings: dict[str, Any] = field(default_factory=dict)

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        # fsum is exact, so the order of the windows plays no part.
        nats = -math.fsum(scores[:, 0].tolist())
        scored = sum(window.num_scored for window in self.windows)
        results = {
            "perplexity": perplexity(nats, scored),
            "loss": nats / scored,
            "tokens": len(self.windows.tokens),
            "tokens_scored": scored,
            "windows": len(self.windows),
        }
        size = self.size()
        if size is None:
            return results
        return results | {
            "bits_per_byte": nats / math.log(2) / size.bytes if size.bytes else None,
            "perplexity_per_byte": perplexity(nats, size.bytes),
            "perplexity_per_word": perplexity(nats, size.words),
            "perplexity_per_word_and_line_end": perplexity(nats, size.words + size.line_ends),
            "bytes": size.bytes,
            "words": size.words,
            "line_ends": size.line_ends,
        }


def perplexity(nats: float, units: int) -> float | None:
    """exp of the mean; None where it is not defined or not finite."""
    return math.exp(nats / units) if units and nats / units < LARGEST_EXPONENT else None


def text_perplexity(
    original: str,
    tokenizer: Tokenizer,
    window: int,
    stride: int | None = None,
    detokenizer: str = "none",
    limit: int | None = None,
) -> Perplexity:
    """Perplexity of one text, read from its first token to its last.

    window: tokens that the model reads at once; stride: tokens between windows, None takes half the window.
    """
    text = detokenize(original, detokenizer)
    tokens = tokenizer.encode_batch([text])[0]
    if len(tokens) < 2:
        raise ConfigError(f"--input: the text has {len(tokens)} tokens; must be 2 tokens or more")
    settings: dict[str, Any] = {"detokenizer": detokenizer}
    if detokenizer != "none":
        settings["lines_made_equal_by_detokenizer"] = count_collisions(original, detokenizer)
    return _perplexity(tokens, lambda: TextSize.of(original), window, stride, limit, settings)


def token_file_perplexity(
    dataset: IndexedDataset, tokenizer: Tokenizer, window: int, stride: int | None = None, limit: int | None = None
) -> Perplexity:
    """Perplexity of a token file as one stream, end-of-document tokens included, which add tokens and no bytes.

    Bytes and words are those of the decoded documents, where ids that only the model has stand for no text.
    """

    def size() -> TextSize:
        documents = (dataset.document(index).tolist() for index in range(len(dataset)))
        return sum((TextSize.of(tokenizer.decode(tokens)) for tokens in documents), TextSize(0, 0, 0))

    return _perplexity(dataset.tokens(0, dataset.num_tokens), size, window, stride, limit, {})


def _perplexity(
    tokens: np.ndarray,
    size: Callable[[], TextSize | None],
    window: int,
    stride: int | None,
    limit: int | None,
    settings: dict[str, Any],
) -> Perplexity:
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"--stride: {stride}; must be 1 to {window}, the window")
    whole = len(SlidingWindows(tokens, window, stride))
    windows = SlidingWindows(tokens, window, stride, limit)
    settings = {"window": window, "stride": stride, **settings}
    return Perplexity(windows, size if len(windows) == whole else lambda: None, settings)
