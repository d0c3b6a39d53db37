"""Tasks on continuations of a context: the last word of a passage, and multiple choice by likelihood.

    task = last_word_task(read_jsonl("lambada.jsonl"), tokenizer, seq_length)
    results = task.results(Scorer(model).scores(task.windows))

Context and continuation are encoded together, and the tokens after those of the context alone are scored; white space
at the end of the context goes to the continuation. Of a context that is too long the end is kept. An empty context
means the beginning of a document.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megasparse.config.loader import ConfigError
from megasparse.data.tokenizer import Tokenizer
from megasparse.evaluation.inputs import check_unicode, text_field
from megasparse.evaluation.perplexity import perplexity
from megasparse.evaluation.windows import Window, continuation_window

Records = Iterable[tuple[str, dict[str, Any]]]
"""(place in the input, JSON object)."""


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, begin: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids of context and continuation; the context has at least one.

    begin: what an empty context is, where a model has a token of its own for it; None: the end of a document.
    """
    bare = context.rstrip()
    continuation, context = context[len(bare) :] + continuation, bare
    if not context:
        return [tokenizer.end_of_document_id if begin is None else begin], tokenizer.encode(continuation)
    context_ids = tokenizer.encode(context)
    return context_ids, tokenizer.encode(context + continuation)[len(context_ids) :]


@dataclass(frozen=True)
class LastWord:
    """Whether the model, choosing the most likely token each time, would have written the last word."""

    windows: list[Window]
    settings: dict[str, Any] = field(default_factory=dict)

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        nats = -math.fsum(scores[:, 0].tolist())
        return {
            "accuracy": int(scores[:, 1].sum()) / len(self.windows),
            "perplexity_per_last_word": perplexity(nats, len(self.windows)),
            "perplexity": perplexity(nats, sum(window.num_scored for window in self.windows)),
            "examples": len(self.windows),
        }


@dataclass(frozen=True)
class MultipleChoice:
    """Which of an example's choices is the likeliest, as it is, per character and per byte of the choice."""

    windows: list[Window]
    """Those of all choices of the first example, of the second, ..."""
    choices: list[list[str]]
    labels: list[int]
    settings: dict[str, Any] = field(default_factory=dict)

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        correct = np.zeros(3, np.int64)
        end = 0
        for choices, label in zip(self.choices, self.labels, strict=True):
            start, end = end, end + len(choices)
            likelihoods = scores[start:end, 0]
            characters = np.array([len(choice) for choice in choices])
            lengths = np.array([len(choice.encode("utf-8")) for choice in choices])
            # Of equal ones the first counts.
            chosen = [np.argmax(likelihoods / divisor) for divisor in (1, characters, lengths)]
            correct += np.array(chosen) == label
        shares = (correct / len(self.labels)).tolist()
        names = ("accuracy", "accuracy_per_character", "accuracy_per_byte")
        return {**dict(zip(names, shares, strict=True)), "examples": len(self.labels), "choices": len(scores)}


def last_word_task(records: Records, tokenizer: Tokenizer, seq_length: int) -> LastWord:
    """Records: {"text": a passage of at least two words}; other keys are ignored."""
    windows = []
    for where, record in records:
        text = text_field(record, "text", where).rstrip()
        start = len(text) - len(text.split()[-1])
        if not text[:start].strip():
            raise ConfigError(f"{where}: text: {text!r} is a single word; must be a passage of two or more")
        windows.append(_window(tokenizer, text[:start], text[start:], seq_length, f"{where}: text"))
    return LastWord(windows)


def multiple_choice_task(
    records: Records, tokenizer: Tokenizer, seq_length: int, begin: int | None = None
) -> MultipleChoice:
    """Records: {"context": text, "choices": [text, ...], "label": index of the right one}; other keys are ignored.

    A space is put before a choice, unless there is white space already or the context is empty. begin: see
    ``encode_pair``.
    """
    windows: list[Window] = []
    choices, labels = [], []
    for where, record in records:
        context = text_field(record, "context", where, may_be_empty=True)
        texts, label = _choices(record, where), record.get("label")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(texts):
            raise ConfigError(f"{where}: label: {label!r}; must be 0 to {len(texts) - 1}")
        for number, text in enumerate(texts):
            needs_space = context and not context[-1].isspace() and not text[0].isspace()
            continuation = f" {text}" if needs_space else text
            windows.append(_window(tokenizer, context, continuation, seq_length, f"{where}: choices[{number}]", begin))
        choices.append(texts)
        labels.append(label)
    return MultipleChoice(windows, choices, labels)


def _choices(record: dict[str, Any], where: str) -> list[str]:
    texts: Any = record.get("choices")
    good = isinstance(texts, list) and len(texts) >= 2
    if not good or not all(isinstance(text, str) and text.strip() for text in texts):
        found = "missing" if "choices" not in record else repr(texts)
        raise ConfigError(f"{where}: choices: {found}; must be a list of two or more texts, none of them empty")
    return [check_unicode(text, f"{where}: choices[{number}]") for number, text in enumerate(texts)]


def _window(
    tokenizer: Tokenizer, context: str, continuation: str, seq_length: int, where: str, begin: int | None = None
) -> Window:
    context_ids, continuation_ids = encode_pair(tokenizer, context, continuation, begin)
    if not 1 <= len(continuation_ids) <= seq_length:
        raise ConfigError(
            f"{where}: {continuation.strip()[:60]!r} has {len(continuation_ids)} tokens of its own; must be "
            f"1 to {seq_length}, the sequence length of the model"
        )
    return continuation_window(context_ids, continuation_ids, seq_length)
