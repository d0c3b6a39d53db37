"""Turns examples in JSON lines into an indexed dataset with a loss mask: what a model is asked, and what it answers.

    encoder = ExampleEncoder(tokenizer, ExampleOptions())
    report = preprocess_examples(CorpusReader(["tasks.jsonl"]), encoder, "data/tasks")

    {"prompt": "2 + 2 =", "response": " 4"}                   joined as they are
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}      by a template

An example becomes a document that ends with the end-of-document token, which is learned along with the answers. Prompt
and answer are encoded apart, the answer with the last character of the prompt as its context: the tokens of the prompt
are those that the model is later asked with.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from megasparse.data.chat import GUARD, Part, PlainTemplate, Template
from megasparse.data.corpus import CorpusReader
from megasparse.data.facts import DataFacts
from megasparse.data.index_format import DatasetError, smallest_dtype
from megasparse.data.indexed import IndexedDatasetWriter
from megasparse.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExampleOptions:
    """Keys of an example, and the longest that is taken, in tokens with its end token; None: any."""

    prompt_key: str = "prompt"
    response_key: str = "response"
    messages_key: str = "messages"
    max_tokens: int | None = None


@dataclass(frozen=True)
class ExampleReport:
    """What was written. `too_long`: examples that were left out because of `max_tokens`."""

    examples: int
    tokens: int
    learned_tokens: int
    too_long: int
    seconds: float

    def __str__(self) -> str:
        left_out = f", {self.too_long:,} longer ones left out" if self.too_long else ""
        return (
            f"{self.examples:,} examples{left_out}, {self.tokens:,} tokens, of which {self.learned_tokens:,} are "
            f"learned, in {self.seconds:.1f} s"
        )


class ExampleEncoder:
    """template: of conversations. special: tokens that it may write, by the text that spells them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: ExampleOptions,
        template: Template | None = None,
        special: Mapping[str, int] | None = None,
    ) -> None:
        self.tokenizer, self.options = tokenizer, options
        self._template = template or PlainTemplate()
        self._special = dict(special or {})
        names = sorted(self._special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def __call__(self, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and loss mask of an example, [tokens] each. ValueError for one that has no prompt or no answer."""
        options = self.options
        if options.messages_key in record:
            messages = record[options.messages_key]
            if not isinstance(messages, list):
                raise ValueError(f"{options.messages_key!r} is no list; must be one of messages")
            parts, special = self._template.parts(messages), True
        else:
            texts = {key: record.get(key) for key in (options.prompt_key, options.response_key)}
            for key, text in texts.items():
                if not isinstance(text, str) or not text:
                    raise ValueError(
                        f"no text under the key {key!r}; must have a prompt and a response, or {options.messages_key!r}"
                    )
            parts, special = [(str(text), key == options.response_key) for key, text in texts.items()], False
        return self._encoded(parts, special)

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation up to the invitation to answer, the same as those of an example before its last
        answer. ValueError for what the template refuses."""
        *asked, _ = self._template.parts([*messages, {"role": "assistant", "content": "-"}])
        return self._joined(asked, True)[0]

    def _encoded(self, parts: list[Part], special: bool) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = self._joined(parts, special)
        # A template may have written the end token itself.
        if tokens[-1] != self.tokenizer.end_of_document_id:
            tokens.append(self.tokenizer.end_of_document_id)
            mask.append(1)
        if sum(mask[1:]) == 0 or mask[0]:
            raise ValueError("no token of a prompt before the answer; must have both")
        return np.array(tokens, np.int32), np.array(mask, np.uint8)

    def _joined(self, parts: list[Part], special: bool) -> tuple[list[int], list[int]]:
        tokens: list[int] = []
        mask: list[int] = []
        before = ""
        for text, learned in parts:
            ids = self._with_special(text, before) if special else self._continuation(before, text)
            tokens += ids
            mask += [int(learned)] * len(ids)
            # Behind a special token text begins anew.
            before = "" if special and text.endswith(tuple(self._special)) else text
        return tokens, mask

    def _with_special(self, text: str, before: str) -> list[int]:
        """Of text that a template wrote: its special tokens are special, those that messages spell are text."""
        ids: list[int] = []
        position = 0
        for found in [*self._spelled.finditer(text), None]:
            end = len(text) if found is None else found.start()
            ids += self._continuation(before, text[position:end].replace(GUARD, ""))
            if found is not None:
                ids.append(self._special[found.group()])
                position, before = found.end(), ""
        return ids

    def _continuation(self, before: str, text: str) -> list[int]:
        """Of text that stands behind other text, whose tokens are fixed."""
        if not text:
            return []
        edge = before[-1:]
        if not edge:
            return self.tokenizer.encode(text)
        first, both = self.tokenizer.encode(edge), self.tokenizer.encode(edge + text)
        return both[len(first) :] if both[: len(first)] == first else self.tokenizer.encode(text)


def preprocess_examples(
    reader: CorpusReader,
    encode: ExampleEncoder,
    prefix: str | PathLike[str],
    *,
    limit_documents: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ExampleReport:
    """Writes `<prefix>.bin`, `.idx`, `.meta.json` and `<prefix>.loss_mask.bin`, `.idx`, replacing them.

    DatasetError, naming file and line, for what is no example, and where there is none that is short enough.
    """
    began, tokenizer = time.monotonic(), encode.tokenizer
    longest, too_long, learned = encode.options.max_tokens, 0, 0
    dtype, facts = smallest_dtype(tokenizer.vocab_size), DataFacts.of(tokenizer)
    with IndexedDatasetWriter(prefix, dtype, vocab_size=tokenizer.vocab_size, facts=facts, loss_mask=True) as writer:
        for where, record in reader.records():
            try:
                tokens, mask = encode(record)
            except ValueError as error:
                raise DatasetError(f"{where}: {error}") from error
            if longest is not None and len(tokens) > longest:
                too_long += 1
                continue
            writer.add_document(tokens, mask)
            learned += int(mask.sum())
            if progress:
                progress(reader.bytes_read)
            if writer.num_documents == limit_documents:
                break
        if writer.num_documents == 0:
            held = f"{too_long} examples, all longer than --max-tokens {longest}" if too_long else "no examples"
            raise DatasetError(f"the input holds {held}; must hold some")
    return ExampleReport(writer.num_documents, writer.num_tokens, learned, too_long, time.monotonic() - began)
