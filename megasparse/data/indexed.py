"""Reader and writer of token datasets in the Megatron `.bin`/`.idx` format (see `index_format`).

    with IndexedDatasetWriter("corpus", smallest_dtype(vocab_size), vocab_size=vocab_size) as writer:
        writer.add_document(token_ids)
    dataset = IndexedDataset("corpus")
    dataset.document(0)            # read-only array, a view of the memory-mapped file
    dataset.tokens(1000, 2000)     # any slice of the token stream

The writer works in temporary files beside the target and renames them at the end, so a prefix never names
half-written data. The reader checks everything that can be checked without reading the tokens.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from megasparse.data.facts import DataFacts, facts_path, read_facts, write_facts
from megasparse.data.index_format import (
    HEADER,
    MAGIC,
    MAX_SEQUENCE_LENGTH,
    VERSION,
    DatasetError,
    dataset_paths,
    dtype_code,
    dtype_from_code,
    loss_mask_prefix,
)
from megasparse.utils.files import sync_and_close, sync_folder, temporary_beside

# Entries of an index, or tokens of a file, that are handled at once: bounds the temporary memory to tens of MB.
CHUNK = 2**20


class IndexedDataset:
    """Memory-mapped reader of one dataset. Opening validates the pair of files; violations raise `DatasetError`.

    Attributes: `prefix`, `dtype`, `num_tokens`, `num_documents`, `document_offsets`: int64 [num_documents + 1], the
    token offset of each document and the total at the end, `facts`: how the data was made, None where unknown, and
    `loss_mask`: the mask beside supervised data, a dataset of uint8 with the same documents, else None.
    """

    def __init__(self, prefix: str | PathLike[str]):
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = dataset_paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise DatasetError(f"{path}: no such file; a dataset prefix names a pair of .bin and .idx files")
        self.dtype, lengths, pointers, document_indices = _read_index(self.idx_path)
        self.num_tokens = _check_sequences(self.idx_path, lengths, pointers, self.dtype.itemsize)
        if len(lengths) and len(document_indices) == 1 and document_indices[0] == 0:
            # GPT-NeoX merges data sets without their document indices; each sequence is a document there.
            document_indices = np.arange(len(lengths) + 1)
        _check_documents(self.idx_path, document_indices, len(lengths))
        expected, found = self.num_tokens * self.dtype.itemsize, self.bin_path.stat().st_size
        if found != expected:
            raise DatasetError(
                f"{self.bin_path}: the file has {found} bytes; {self.idx_path.name} says {self.num_tokens} tokens "
                f"of {self.dtype.name}, {expected} bytes"
            )
        self.num_documents = len(document_indices) - 1
        ends = np.append(pointers, expected) // self.dtype.itemsize
        self.document_offsets: np.ndarray = ends[document_indices]
        self.facts = read_facts(prefix, documents=self.num_documents, tokens=self.num_tokens)
        # An empty file cannot be memory-mapped.
        self._tokens = np.memmap(self.bin_path, self.dtype, "r") if found else np.empty(0, self.dtype)
        self.loss_mask = _open_loss_mask(self)

    def __len__(self) -> int:
        return self.num_documents

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, a read-only view [document length] in the dtype of the file."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} is outside the {self.num_documents} documents of {self.prefix}")
        return self.tokens(int(self.document_offsets[index]), int(self.document_offsets[index + 1]))

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the token stream, a read-only view in the dtype of the file."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are outside the {self.num_tokens} tokens of {self.prefix}")
        return self._tokens[start:stop]

    def document_at(self, token_offset: int) -> int:
        """The document that holds the token at `token_offset`."""
        return int(np.searchsorted(self.document_offsets, token_offset, side="right")) - 1

    def documents_of(self, start: int, count: int) -> np.ndarray:
        """The document of each of the tokens [start, start + count), int64."""
        first, last = self.document_at(start), self.document_at(start + count - 1)
        ends = self.document_offsets[first + 1 : last + 2].clip(max=start + count)
        return np.repeat(np.arange(first, last + 1), np.diff(ends, prepend=start))


def _open_loss_mask(indexed: IndexedDataset) -> IndexedDataset | None:
    """The mask beside a dataset, where there is one. DatasetError where it is not of the same documents."""
    prefix = loss_mask_prefix(indexed.prefix)
    if not any(path.exists() for path in dataset_paths(prefix)):
        return None
    mask = IndexedDataset(prefix)
    if mask.dtype != np.uint8:
        raise DatasetError(f"{mask.idx_path}: holds {mask.dtype.name}; a loss mask must hold uint8, 0 or 1 a token")
    if not np.array_equal(mask.document_offsets, indexed.document_offsets):
        raise DatasetError(
            f"{mask.idx_path}: {mask.num_documents} documents with {mask.num_tokens} tokens, {indexed.idx_path.name} "
            f"has {indexed.num_documents} with {indexed.num_tokens}; must be the mask of the same documents"
        )
    return mask


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Reads dtype, lengths int32 [S], pointers int64 [S] and document indices int64 [E] (memory-mapped)."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER.size)
    if header[: len(MAGIC)] != MAGIC:
        raise DatasetError(f"{path}: begins with {header[: len(MAGIC)]!r}; an index file begins with {MAGIC!r}")
    if len(header) < HEADER.size:
        raise DatasetError(f"{path}: the file has {size} bytes; the header alone has {HEADER.size}")
    _, version, code, sequences, indices = HEADER.unpack(header)
    if version != VERSION:
        raise DatasetError(f"{path}: format version {version}; this reader knows version {VERSION}")
    dtype = dtype_from_code(code, path)
    expected = HEADER.size + sequences * 12 + indices * 8
    if size not in (expected, expected + sequences):
        raise DatasetError(
            f"{path}: the file has {size} bytes; {sequences} sequences and {indices} document indices need {expected}"
        )
    if indices < 1:
        raise DatasetError(f"{path}: no document indices; even an empty dataset has one")
    content = np.memmap(path, np.uint8, "r")
    parts = np.split(content[HEADER.size : expected], [4 * sequences, 12 * sequences])
    lengths, pointers, document_indices = (
        part.view(kind) for part, kind in zip(parts, ("<i4", "<i8", "<i8"), strict=True)
    )
    return dtype, lengths, pointers, document_indices


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Checks that sequences follow each other without gaps. Returns the number of tokens."""
    total = 0
    for start in range(0, len(lengths), CHUNK):
        chunk = lengths[start : start + CHUNK].astype(np.int64)
        if chunk.min() < 0:
            bad = start + int(np.argmin(chunk))
            raise DatasetError(f"{path}: sequence {bad} has length {lengths[bad]}; lengths are not negative")
        ends = total + np.cumsum(chunk)
        expected = (ends - chunk) * itemsize
        wrong = np.flatnonzero(pointers[start : start + CHUNK] != expected)
        if wrong.size:
            bad = int(wrong[0])
            raise DatasetError(
                f"{path}: sequence {start + bad} points to byte {pointers[start + bad]}; "
                f"the sequences before it end at byte {expected[bad]}"
            )
        total = int(ends[-1])
    return total


def _check_documents(path: Path, document_indices: np.ndarray, sequences: int) -> None:
    first, last = int(document_indices[0]), int(document_indices[-1])
    if first != 0 or last != sequences:
        raise DatasetError(
            f"{path}: documents run from sequence {first} to {last}; they must run from 0 to {sequences}"
        )
    wrong = np.flatnonzero(document_indices[1:] < document_indices[:-1])
    if wrong.size:
        bad = int(wrong[0])
        raise DatasetError(
            f"{path}: document {bad} runs from sequence {document_indices[bad]} to {document_indices[bad + 1]}; "
            "document indices must not decrease"
        )


class IndexedDatasetWriter:
    """Writes one dataset; a context manager that finalizes on success and leaves nothing behind on an exception.

    `vocab_size`, where given, bounds the ids that are accepted; the dtype always does. Only `finalize` makes the
    dataset appear under `prefix`, replacing one that is there. The folder is made where missing. `facts`, where given,
    are recorded beside the data, see ``facts``; those of a dataset that is replaced go with it, as does its loss mask.
    With `loss_mask` one is written with the documents.
    """

    def __init__(
        self,
        prefix: str | PathLike[str],
        dtype: np.dtype | type | str,
        *,
        vocab_size: int | None = None,
        max_sequence_length: int = MAX_SEQUENCE_LENGTH,
        facts: DataFacts | None = None,
        loss_mask: bool = False,
    ):
        self.code = dtype_code(dtype)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        largest = int(np.iinfo(self.dtype).max) + 1
        self.id_limit = largest if vocab_size is None else min(vocab_size, largest)
        if not 1 <= max_sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(f"max_sequence_length is {max_sequence_length}; must be 1 to {MAX_SEQUENCE_LENGTH}")
        self.max_sequence_length = max_sequence_length
        self.facts = facts
        self.prefix = os.fspath(prefix)
        self.bin_path, self.idx_path = dataset_paths(prefix)
        self._lengths = array("i")
        self._document_indices = array("q", [0])
        self._open_tokens = 0
        self.num_tokens = 0
        self.bin_path.parent.mkdir(parents=True, exist_ok=True)
        self._mask = IndexedDatasetWriter(loss_mask_prefix(prefix), np.uint8, vocab_size=2) if loss_mask else None
        self._bin_temporary = temporary_beside(self.bin_path)
        self._file = open(self._bin_temporary, "wb")
        self._open = True

    @property
    def num_documents(self) -> int:
        return len(self._document_indices) - 1

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc_type is None:
            self.finalize()
        else:
            self.abort()

    def add_document(
        self, tokens: Sequence[int] | np.ndarray, loss_mask: Sequence[int] | np.ndarray | None = None
    ) -> None:
        """Appends one document. ValueError for ids that are no integers, negative, or beyond dtype or vocabulary.

        loss_mask: as many numbers as tokens, 1 where a token is learned, else 0; only with a writer of such masks.
        """
        tokens = np.asarray(tokens)
        assert (loss_mask is None) == (self._mask is None), "masks are written for all documents or none"
        if self._mask is not None:
            mask = np.asarray(loss_mask)
            assert mask.shape == tokens.shape, f"{mask.shape} of the mask, {tokens.shape} of the tokens"
            self._mask.add_document(mask)
        self.add_fragments(tokens, np.array([tokens.size]), np.array([True]))

    def add_fragments(
        self, tokens: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray, ends: Sequence[bool] | np.ndarray
    ) -> None:
        """Appends many pieces of documents at once.

        `tokens` [sum of lengths] holds the pieces one after the other; piece i has lengths[i] tokens and closes its
        document if ends[i], so a document may arrive over several pieces and calls.
        """
        assert self._open, "the writer is closed"
        tokens = np.asarray(tokens)
        lengths, ends = np.asarray(lengths, np.int64), np.asarray(ends, bool)
        assert tokens.ndim == 1 and lengths.shape == ends.shape and lengths.sum() == tokens.size
        self._check_ids(tokens)
        self._file.write(np.ascontiguousarray(tokens, self.dtype).data)
        self.num_tokens += tokens.size
        closed_at = np.cumsum(lengths)[ends]
        document_lengths = np.diff(closed_at, prepend=0)
        if document_lengths.size:
            document_lengths[0] += self._open_tokens
            self._open_tokens = 0
        for length in document_lengths.tolist():
            self._close_document(length)
        self._open_tokens += tokens.size - (int(closed_at[-1]) if closed_at.size else 0)

    def finalize(self) -> None:
        """Writes the index and makes the dataset visible: .bin first, .idx last. Further calls do nothing."""
        if not self._open:
            return
        if self._open_tokens:
            self._close_document(self._open_tokens)
            self._open_tokens = 0
        idx_temporary = None
        try:
            sync_and_close(self._file)
            idx_temporary = temporary_beside(self.idx_path)
            with open(idx_temporary, "wb") as file:
                self._write_index(file)
                sync_and_close(file)
            # Without this an old .idx could pair with the new .bin if the machine stops between the two renames.
            self.idx_path.unlink(missing_ok=True)
            facts_path(self.prefix).unlink(missing_ok=True)
            # The mask goes before the tokens come, and a new one comes before them: they are never seen without it.
            for path in reversed(dataset_paths(loss_mask_prefix(self.prefix))):
                path.unlink(missing_ok=True)
            if self._mask is not None:
                self._mask.finalize()
            os.replace(self._bin_temporary, self.bin_path)
            os.replace(idx_temporary, self.idx_path)
            if self.facts is not None:
                write_facts(self.prefix, self.facts, documents=self.num_documents, tokens=self.num_tokens)
        except BaseException:
            if idx_temporary is not None:
                idx_temporary.unlink(missing_ok=True)
            self.abort()
            raise
        self._open = False
        sync_folder(self.bin_path.parent)

    def abort(self) -> None:
        """Drops everything written so far; an existing dataset of the same prefix stays as it was."""
        if self._mask is not None:
            self._mask.abort()
        if self._open:
            self._open = False
            self._file.close()
            self._bin_temporary.unlink(missing_ok=True)

    def _check_ids(self, tokens: np.ndarray) -> None:
        if tokens.size == 0:
            return
        if tokens.dtype.kind not in "iu":
            raise ValueError(f"{self.prefix}: token ids of dtype {tokens.dtype.name}; they must be integers")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.id_limit:
            raise ValueError(
                f"{self.prefix}: token id {low if low < 0 else high}; ids must be 0 to {self.id_limit - 1} "
                f"(dtype {self.dtype.name} and vocabulary size)"
            )

    def _close_document(self, length: int) -> None:
        while length > self.max_sequence_length:
            self._lengths.append(self.max_sequence_length)
            length -= self.max_sequence_length
        self._lengths.append(length)
        self._document_indices.append(len(self._lengths))

    def _write_index(self, file) -> None:
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        document_indices = np.frombuffer(self._document_indices, np.int64)
        file.write(HEADER.pack(MAGIC, VERSION, self.code, len(lengths), len(document_indices)))
        file.write(lengths.astype("<i4", copy=False).data)
        position = 0
        for start in range(0, len(lengths), CHUNK):
            sizes = lengths[start : start + CHUNK].astype(np.int64) * self.dtype.itemsize
            ends = position + np.cumsum(sizes)
            file.write((ends - sizes).astype("<i8", copy=False).data)
            position = int(ends[-1])
        file.write(document_indices.astype("<i8", copy=False).data)
