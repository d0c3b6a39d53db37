"""The text of tokens that come one by one: whole characters only, and nothing behind a stop string.

    text = GrowingText(tokenizer, prompt_ids, stop=("\\n\\n",))
    shown = text.add(token)      # what is certain now; text.stopped: a stop string was met
    shown += text.finish()       # what was held back

The parts together are the same however they are cut, so that a streamed answer is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

from megasparse.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no character, or the beginning of one."""

CONTEXT = 8
"""Tokens of the prompt that are decoded along: some tokenizers drop the space before the first word of a text, and a
character has at most four bytes."""


class GrowingText:
    """Decodes only the last tokens, from the last place at which the text was whole."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        ends = (prompt_ids[-count:] for count in range(CONTEXT, 2 * CONTEXT))
        self._begin_behind(next(filter(self._is_context, ends), prompt_ids[-CONTEXT:]))
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token, often none."""
        assert not self.stopped, "the text has stopped"
        self._window.append(token)
        new = self._new_text()
        # After a token without text, the context of the next one is that of this one.
        if not new or new.endswith(UNFINISHED):
            return ""
        self._held += new
        shown_last = self._window[self._first_new :]
        self._begin_behind(shown_last if self._is_context(shown_last) else self._window)
        return self._release()

    def finish(self) -> str:
        """What was held back, an unfinished character included; after a stop string nothing."""
        if self.stopped:
            return ""
        self._held += self._new_text()
        shown = self._release()
        shown, self._held = shown + self._held, ""
        return shown

    def _is_context(self, tokens: Sequence[int]) -> bool:
        """Whether tokens behind these read as they do in the whole text: not from within a character, and not behind
        spaces alone, which may be dropped."""
        text = self._tokenizer.decode(tokens)
        return bool(text.strip()) and not text.startswith(UNFINISHED)

    def _begin_behind(self, context: Sequence[int]) -> None:
        self._window, self._first_new = list(context), len(context)
        self._context = self._tokenizer.decode(self._window)

    def _new_text(self) -> str:
        """The text behind the context; of a character that begins in the context, the whole of it."""
        whole = self._tokenizer.decode(self._window)
        known = len(commonprefix((self._context, whole)))
        new = whole[known:]
        is_rewritten = known < len(self._context.rstrip(UNFINISHED))
        if not is_rewritten and not new.startswith(UNFINISHED):
            return new
        # Some decoders write all bytes of a row of them as U+FFFD where one is wrong, those of the context too. Others
        # write one for several bytes, of which the context has the first.
        alone = self._tokenizer.decode(self._window[self._first_new :])
        return alone if is_rewritten else min(alone, new, key=len)

    def _release(self) -> str:
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        # The end may be the beginning of a stop string.
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        split = len(self._held) - kept
        shown, self._held = self._held[:split], self._held[split:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which a stop string begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
