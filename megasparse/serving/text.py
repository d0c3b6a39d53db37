"""The text of tokens that come one by one: whole characters only, and nothing behind a stop string.

    text = GrowingText(tokenizer, prompt_ids, stop=("\\n\\n",))
    shown = text.add(token)      # what is certain now; text.stopped: a stop string was met
    shown += text.finish()       # what was held back

The parts together are the same however they are cut, so that a streamed answer is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self._window = list(prompt_ids[-CONTEXT:])
        self._known = len(self._decoded().rstrip(UNFINISHED))
        self._first_new = len(self._window)
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain with one more token, often none."""
        assert not self.stopped, "the text has stopped"
        self._window.append(token)
        decoded = self._decoded()
        if decoded.endswith(UNFINISHED):
            return ""
        if len(decoded) <= self._known:
            # A token without text: the context of the next one is that of this one.
            return ""
        self._held += decoded[self._known :]
        # The tokens just shown stay as the context of the next ones.
        self._window = self._window[self._first_new :]
        self._first_new, self._known = len(self._window), len(self._decoded())
        return self._release()

    def finish(self) -> str:
        """What was held back, an unfinished character included; after a stop string nothing."""
        if self.stopped:
            return ""
        self._held += self._decoded()[self._known :]
        shown = self._release()
        shown, self._held = shown + self._held, ""
        return shown

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window)

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
