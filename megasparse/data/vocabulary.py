"""What every kind of tokenizer offers, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# Names under which published vocabularies keep their end-of-document token, in the order they are looked for.
END_OF_DOCUMENT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "</s>", "<eos>", "[EOS]")


class Tokenizer(Protocol):
    """What the rest of the product asks of a tokenizer.

    `vocab_size`: ids are 0 to vocab_size - 1. `end_of_document_id` is appended to each document and decodes to no
    text. `decode` raises ValueError for an id outside the vocabulary.
    """

    name: str
    vocab_size: int
    end_of_document_id: int

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        """The ids of each text, as integer arrays; the fast way for much text."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


def check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    checked = [int(token) for token in ids]
    for token in checked:
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"{tokenizer.name}: token id {token}; ids must be 0 to {tokenizer.vocab_size - 1}")
    return checked
