"""Cuts documents into segments whose tokens, put together, are the tokens of the whole document.

    for segment in cut_documents(["some text", " that goes on", None], cut_check(tokenizer)): ...

A tokenizer sees more than the characters of a token: it may put a space before each text that it is given, join a
space to the word behind it, or count the digits of a number in threes. So a place to cut is tried first, see
`cut_check`, and a segment brings the character before it, whose tokens are dropped again. Where no place is found the
segment grows up to `LONGEST_SEGMENT`; only there, with a million characters of one kind in a row, is it cut untried.

Where the cuts are depends on the document and the tokenizer alone, not on how the document was read.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from megasparse.data.tokenizer import Tokenizer

# SentencePiece slows down on longer texts: 6.0 MB/s at 64 Ki characters, 2.9 MB/s at 1 Mi.
SEGMENT_CHARACTERS = 2**14
LONGEST_SEGMENT = 2**20
# Characters on each side of a cut that are encoded to try it. Published tokens have up to 128, of white space.
TRIED_CHARACTERS = 256
# Of one sort of place; text where 16 spaces in a row do not serve is not like text.
TRIES = 16

CutCheck = Callable[[str, str], bool]


class Segment(NamedTuple):
    """A piece of a document, and whether the document ends with it (the text may then be empty).

    `context` is the text to encode before it, and whose tokens to drop; empty where the text can stand alone.
    """

    text: str
    ends_document: bool
    context: str = ""


def cut_check(tokenizer: Tokenizer) -> CutCheck:
    """Whether text may be cut between `left` and `right`, which stand around the place.

    It may where the tokens of the left are the first of both, and the rest are those that the right has behind the
    last character of the left.
    """

    def check(left: str, right: str) -> bool:
        edge = left[-1:]
        both, first, short, before = tokenizer.encode_batch([left + right, left, edge + right, edge])
        return (
            np.array_equal(both[: len(first)], first)
            and np.array_equal(short[: len(before)], before)
            and np.array_equal(both[len(first) :], short[len(before) :])
        )

    return check


def cut_documents(texts: Iterable[str | None], may_cut: CutCheck | None = None) -> Iterator[Segment]:
    """Turns pieces of text, with None where a document ends, into segments; empty documents are dropped.

    Without `may_cut` no segment is longer than SEGMENT_CHARACTERS, and the cuts are those of `_plain_cut`.
    """
    document = _Document(may_cut)
    for text in texts:
        if text is not None:
            yield from document.add(text)
        elif document.size or document.started:
            yield from document.end()
            document = _Document(may_cut)


class _Document:
    """The text of a document that has been read and not yet cut off."""

    def __init__(self, may_cut: CutCheck | None) -> None:
        self.size, self.started = 0, False
        self._may_cut = may_cut
        self._waiting: list[str] = []
        self._context = ""
        # Lengths that are tried one after the other; the number of the one that comes next.
        self._lengths: tuple[int, ...] = (SEGMENT_CHARACTERS,)
        self._margin = 0
        if may_cut is not None:
            self._lengths = (SEGMENT_CHARACTERS, 8 * SEGMENT_CHARACTERS, max(LONGEST_SEGMENT, 8 * SEGMENT_CHARACTERS))
            self._margin = TRIED_CHARACTERS
        self._next = 0

    def add(self, text: str) -> Iterator[Segment]:
        self._waiting.append(text)
        self.size += len(text)
        # What follows a cut takes part in the choice, so it must have been read.
        if self.size > self._lengths[self._next] + self._margin:
            yield from self._cut(self._margin)

    def end(self) -> Iterator[Segment]:
        yield from self._cut(0)
        yield Segment("".join(self._waiting), True, self._context)

    def _cut(self, margin: int) -> Iterator[Segment]:
        content, start = "".join(self._waiting), 0
        while len(content) - start > self._lengths[self._next] + margin:
            stop, last = start + self._lengths[self._next], self._next == len(self._lengths) - 1
            cut = None if self._may_cut is None else _tried_cut(content, start, stop, self._may_cut)
            if cut is None and not last:
                self._next += 1
                continue
            end = cut or _plain_cut(content, max(start, stop - SEGMENT_CHARACTERS))
            yield Segment(content[start:end], False, self._context)
            self._context = "" if cut is None else content[end - 1]
            start, self._next, self.started = end, 0, True
        self._waiting, self.size = [content[start:]], len(content) - start


def _plain_cut(content: str, start: int) -> int:
    """Where to cut, at most SEGMENT_CHARACTERS after `start`; there is text beyond.

    After the last line end between two characters that are no white space; else after the last line end; else before
    the last space, as tokenizers join a space to the word behind it; else anywhere.
    """
    stop = start + SEGMENT_CHARACTERS
    newest = newline = content.rfind("\n", start + 1, stop)
    while newline > start:
        if not content[newline - 1].isspace() and not content[newline + 1].isspace():
            return newline + 1
        newline = content.rfind("\n", start + 1, newline)
    if newest > start:
        return newest + 1
    space = content.rfind(" ", start + 1, stop)
    return space if space > start else stop


def _tried_cut(content: str, start: int, stop: int, may_cut: CutCheck) -> int | None:
    """The last place up to `stop` that `may_cut` allows; None where a few of each sort were tried in vain."""
    low = max(start, stop - SEGMENT_CHARACTERS)
    for places in (_after_line_ends, _before_spaces, _between_kinds):
        for tries, place in enumerate(places(content, low, stop)):
            left = content[max(start, place - TRIED_CHARACTERS) : place]
            if may_cut(left, content[place : place + TRIED_CHARACTERS]):
                return place
            if tries == TRIES:
                break
    return None


def _after_line_ends(content: str, low: int, stop: int) -> Iterator[int]:
    newline = content.rfind("\n", low + 1, stop)
    while newline > low:
        if not content[newline - 1].isspace() and not content[newline + 1].isspace():
            yield newline + 1
        newline = content.rfind("\n", low + 1, newline)


def _before_spaces(content: str, low: int, stop: int) -> Iterator[int]:
    space = content.rfind(" ", low + 1, stop)
    while space > low:
        if not content[space - 1].isspace() and not content[space + 1].isspace():
            yield space
        space = content.rfind(" ", low + 1, space)


def _between_kinds(content: str, low: int, stop: int) -> Iterator[int]:
    """Where a word, a number, white space or a row of marks ends: inside one, tokens may depend on where it began."""
    after = _kind(content[stop])
    for place in range(stop, low + 1, -1):
        before = _kind(content[place - 1])
        if before != after:
            yield place
        after = before


def _kind(character: str) -> str:
    if character.isspace():
        return " "
    kind = unicodedata.category(character)[0]
    return {"M": "L"}.get(kind, kind)
