"""What every kind of tokenizer offers, and what they have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# Files beside a tokenizer that declare its end token, and where: by name, or by one id or several.
DECLARATIONS = {
    "tokenizer_config.json": "eos_token",
    "special_tokens_map.json": "eos_token",
    "generation_config.json": "eos_token_id",
}
# Names under which published vocabularies keep their end-of-document token, in the order they are looked for.
END_OF_DOCUMENT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """What the rest of the product asks of a tokenizer.

    `vocab_size`: ids are 0 to vocab_size - 1. `end_of_document_id` is appended to each document and decodes to no
    text; `end_of_document` is its name, where ids have names. `file_sha256` tells its file from others. `decode` passes
    over ids beyond the vocabulary, and raises ValueError for a negative one.
    """

    name: str
    vocab_size: int
    end_of_document_id: int
    end_of_document: str | None
    file_sha256: str | None

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """The ids of each text, as integer arrays; the fast way for much text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def text_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Those of the ids that stand for text: neither the end of a document nor beyond the vocabulary.

    A model may have more rows than its tokenizer has entries, 50,304 for 50,257 say, and can draw each of them.
    Raises ValueError for a negative id.
    """
    checked = [int(token) for token in ids]
    for token in checked:
        if token < 0:
            raise ValueError(f"{tokenizer.name}: token id {token}; ids must be 0 or more")
    return [token for token in checked if token < tokenizer.vocab_size and token != tokenizer.end_of_document_id]


def file_sha256(path: str | PathLike[str]) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def declared_end_tokens(path: str | PathLike[str], vocab_size: int) -> Iterator[str | int]:
    """Names, and ids below `vocab_size`, of the end token that files beside a tokenizer declare, most telling first.

    Raises ValueError naming a declaration that cannot be read.
    """
    for name, key in DECLARATIONS.items():
        file = Path(path).parent / name
        if not file.is_file():
            continue
        try:
            values: Any = json.loads(file.read_text(encoding="utf-8"))
            found = values.get(key)
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file}: not a JSON object ({error})") from error
        for token in found if isinstance(found, list) else [found]:
            # An added token with its properties, as older versions of transformers write it.
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) or (isinstance(content, int) and 0 <= content < vocab_size):
                yield content
