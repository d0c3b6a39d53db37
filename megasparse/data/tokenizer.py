"""Tokenizers behind one small interface.

    tokenizer = load_tokenizer("sentencepiece", "tokenizer.model")
    ids = tokenizer.encode("def f():\\n\\treturn 1\\n")
    tokenizer.decode(ids)

Kinds: `sentencepiece` (a .model file), `huggingface` (a tokenizer.json, through the optional library `tokenizers`)
and `bytes` (the 256 byte values and one end-of-document id, no file).
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Protocol

import numpy as np

TOKENIZER_KINDS = ("sentencepiece", "huggingface", "bytes")
# Names under which published vocabularies keep their end-of-document token, in the order they are looked for.
END_OF_DOCUMENT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "</s>", "<eos>", "[EOS]")
# SentencePiece writes a space as this character (U+2581), so the character itself needs care.
SPACE_MARK = "\u2581"


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


def load_tokenizer(
    kind: str, path: str | PathLike[str] | None = None, *, end_of_document: str | None = None
) -> Tokenizer:
    """Opens a tokenizer of one of `TOKENIZER_KINDS`.

    `end_of_document` names the piece to end documents with where the file does not say it (see
    `END_OF_DOCUMENT_PIECES`). ValueError, naming the file, where it is missing or is no tokenizer of this kind.
    """
    if kind not in TOKENIZER_KINDS:
        raise ValueError(f"tokenizer kind {kind!r}; must be one of {', '.join(TOKENIZER_KINDS)}")
    if kind == "bytes":
        if path is not None:
            raise ValueError(f"the bytes tokenizer has no file, but {fspath(path)} was given")
        return ByteTokenizer()
    if path is None:
        raise ValueError(f"the {kind} tokenizer needs a file; give its path")
    if not Path(path).is_file():
        raise ValueError(f"{fspath(path)}: no such tokenizer file")
    loader = SentencePieceTokenizer if kind == "sentencepiece" else HuggingFaceTokenizer
    return loader(path, end_of_document)


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    checked = [int(token) for token in ids]
    for token in checked:
        if not 0 <= token < tokenizer.vocab_size:
            raise ValueError(f"{tokenizer.name}: token id {token}; ids must be 0 to {tokenizer.vocab_size - 1}")
    return checked


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; id 256 ends a document. Bytes that are no UTF-8 decode to U+FFFD."""

    name = "bytes"
    vocab_size = 257
    end_of_document_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        content = bytes(token for token in _check_ids(ids, self) if token != self.end_of_document_id)
        return content.decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A SentencePiece model. Documents end with the model's eos piece, or else with a piece of a well-known name.

    Models with byte fallback and no dummy prefix (those of tools/train_tokenizer.py) also keep U+2581, which
    SentencePiece alone would turn into a space: it is encoded as its three bytes.
    """

    def __init__(self, path: str | PathLike[str], end_of_document: str | None = None):
        try:
            import sentencepiece
        except ImportError as error:
            raise ValueError("the sentencepiece tokenizer needs the library: pip install sentencepiece") from error
        self.name = f"sentencepiece:{Path(path).name}"
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=fspath(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{fspath(path)}: not a SentencePiece model") from error
        self.vocab_size = int(self._model.vocab_size())
        self.end_of_document_id = self._find_end_of_document(fspath(path), end_of_document)
        self._return_type = self._probe_return_type()
        self._space_mark_ids = self._find_space_mark_ids()

    def _find_end_of_document(self, path: str, end_of_document: str | None) -> int:
        if end_of_document is None and self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        wanted = END_OF_DOCUMENT_PIECES if end_of_document is None else (end_of_document,)
        for piece in wanted:
            identifier = int(self._model.piece_to_id(piece))
            if identifier != self._model.unk_id():
                return identifier
        raise ValueError(f"{path}: no end-of-document piece; looked for {', '.join(wanted)}")

    def _probe_return_type(self):
        # Newer releases hand out arrays, older ones only lists of Python integers.
        try:
            self._model.encode(["a"], out_type="numpy")
        except (ValueError, RuntimeError, TypeError):
            return int
        return "numpy"

    def _find_space_mark_ids(self) -> list[int] | None:
        ids = [int(self._model.piece_to_id(f"<0x{byte:02X}>")) for byte in SPACE_MARK.encode("utf-8")]
        has_bytes = all(self._model.is_byte(identifier) for identifier in ids)
        has_dummy_prefix = self._model.encode("a", out_type=str)[0].startswith(SPACE_MARK)
        return ids if has_bytes and not has_dummy_prefix else None

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        marked = self._space_mark_ids is not None and any(SPACE_MARK in text for text in texts)
        if not marked:
            return self._encode_plain(list(texts), num_threads)
        parts = [text.split(SPACE_MARK) for text in texts]
        encoded = iter(self._encode_plain([part for row in parts for part in row], num_threads))
        mark = np.array(self._space_mark_ids, np.int32)
        joined = []
        for row in parts:
            pieces = [next(encoded)]
            for _ in row[1:]:
                pieces += [mark, next(encoded)]
            joined.append(np.concatenate(pieces))
        return joined

    def _encode_plain(self, texts: list[str], num_threads: int) -> list[np.ndarray]:
        rows = self._model.encode(texts, out_type=self._return_type, num_threads=num_threads)
        return [np.asarray(row, np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [token for token in _check_ids(ids, self) if token != self.end_of_document_id]
        return self._model.decode(kept)


class HuggingFaceTokenizer:
    """A tokenizer.json, through the library `tokenizers` (extra `hf`). No special tokens are added to a text.

    The library decides about threads itself (RAYON_NUM_THREADS); `num_threads` of `encode_batch` has no effect.
    """

    def __init__(self, path: str | PathLike[str], end_of_document: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                "the huggingface tokenizer needs the library `tokenizers`: pip install 'megasparse[hf]'"
            ) from error
        self.name = f"huggingface:{Path(path).name}"
        try:
            self._model = tokenizers.Tokenizer.from_file(fspath(path))
        # The library raises a bare Exception for a file it cannot read.
        except Exception as error:
            raise ValueError(f"{fspath(path)}: not a tokenizer.json of the tokenizers library ({error})") from error
        # Stored for the batches of a model that reads 512 tokens, say: they would drop text, or add tokens to it.
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the largest one counts, not their number.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        wanted = END_OF_DOCUMENT_PIECES if end_of_document is None else (end_of_document,)
        found = [vocabulary[piece] for piece in wanted if piece in vocabulary]
        if not found:
            raise ValueError(f"{fspath(path)}: no end-of-document token; looked for {', '.join(wanted)}")
        self.end_of_document_id = found[0]
        self.end_of_document = self._model.id_to_token(found[0])

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        rows = self._model.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(row.ids, np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        kept = [token for token in _check_ids(ids, self) if token != self.end_of_document_id]
        return self._model.decode(kept, skip_special_tokens=False)
