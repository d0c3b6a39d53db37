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

import numpy as np

from megasparse.data.huggingface_tokenizer import HuggingFaceTokenizer
from megasparse.data.vocabulary import (
    END_OF_DOCUMENT_PIECES,
    Tokenizer,
    declared_end_tokens,
    file_sha256,
    text_ids,
)

TOKENIZER_KINDS = ("sentencepiece", "huggingface", "bytes")
# SentencePiece writes a space as this character (U+2581), so the character itself needs care.
SPACE_MARK = "\u2581"


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


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; id 256 ends a document. Bytes that are no UTF-8 decode to U+FFFD."""

    name = "bytes"
    vocab_size = 257
    end_of_document_id = 256
    end_of_document: str | None = None
    file_sha256: str | None = None

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(text_ids(ids, self)).decode("utf-8", errors="replace")


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
        self.file_sha256: str | None = file_sha256(path)
        self.end_of_document_id = self._find_end_of_document(fspath(path), end_of_document)
        self.end_of_document: str | None = self._model.id_to_piece(self.end_of_document_id)
        self._return_type = self._probe_return_type()
        self._space_mark_ids = self._find_space_mark_ids()
        self._spelled_end = self._find_spelled_end()

    def _find_end_of_document(self, path: str, end_of_document: str | None) -> int:
        if end_of_document is None and self._model.eos_id() >= 0:
            return int(self._model.eos_id())
        if end_of_document is not None:
            wanted = [end_of_document]
        else:
            # Control pieces first: texts do not hold them, while `</s>` may be an ordinary piece, of HTML.
            guesses = sorted(END_OF_DOCUMENT_PIECES, key=lambda piece: not self._is_control(piece))
            declared = declared_end_tokens(path, self.vocab_size)
            names = (self._model.id_to_piece(token) if isinstance(token, int) else token for token in declared)
            wanted = [*names, *guesses]
        for piece in wanted:
            identifier = int(self._model.piece_to_id(piece))
            if identifier != self._model.unk_id():
                return identifier
        raise ValueError(f"{path}: no end-of-document piece; looked for {', '.join(wanted)}")

    def _is_control(self, piece: str) -> bool:
        return bool(self._model.is_control(self._model.piece_to_id(piece)))

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

    def _find_spelled_end(self) -> np.ndarray | None:
        """The letters of the end piece as ids, where a text can give that piece: it is a symbol of the user then."""
        piece = self.end_of_document or ""
        if len(piece) < 2 or self.end_of_document_id not in self._model.encode(piece):
            return None
        ids = []
        for letter in piece:
            names = [letter]
            if self._model.piece_to_id(letter) == self._model.unk_id():
                names = [f"<0x{byte:02X}>" for byte in letter.encode("utf-8")]
            ids += [int(self._model.piece_to_id(name)) for name in names]
        return None if self._model.unk_id() in ids else np.array(ids, np.int32)

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
        return [self._without_end(np.asarray(row, np.int32)) for row in rows]

    def _without_end(self, row: np.ndarray) -> np.ndarray:
        """The tokens with the letters of the end piece in place of it: the text spelled it, and ends nothing."""
        if self._spelled_end is None:
            return row
        before, *behind = np.split(row, np.flatnonzero(row == self.end_of_document_id))
        return np.concatenate([before, *(part for rest in behind for part in (self._spelled_end, rest[1:]))])

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(text_ids(ids, self))
