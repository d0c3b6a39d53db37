"""Turns a corpus into an indexed dataset, in one process or over the ranks of an MPI job.

    report = preprocess(CorpusReader(["books.txt.xz"]), load_tokenizer("bytes"), "books")

The segments of the corpus are taken in blocks of about `BLOCK_CHARACTERS`. Every rank reads the whole input, which is
far cheaper than encoding it, but encodes only blocks rank, rank + size, ... into a shard file beside the output; then
rank 0 joins the shards, block by block in input order. So the result has the same bytes for any number of ranks.
The ranks need one shared file system.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np

from megasparse.data.corpus import CorpusReader
from megasparse.data.facts import DataFacts
from megasparse.data.index_format import DatasetError, dataset_paths, smallest_dtype
from megasparse.data.indexed import IndexedDatasetWriter
from megasparse.data.segments import Segment, cut_check
from megasparse.data.tokenizer import Tokenizer

BLOCK_CHARACTERS = 2**21


@dataclass(frozen=True)
class PreprocessReport:
    """What was done. `input_bytes` counts the text as UTF-8; `peak_memory_bytes` is the largest of all ranks."""

    documents: int
    tokens: int
    input_bytes: int
    seconds: float
    peak_memory_bytes: int
    num_ranks: int
    skipped_files: int

    @property
    def megabytes_per_second(self) -> float:
        return self.input_bytes / 1e6 / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.documents:,} documents, {self.tokens:,} tokens from {self.input_bytes / 1e6:.1f} MB of text in "
            f"{self.seconds:.1f} s: {self.megabytes_per_second:.1f} MB/s on {self.num_ranks} process(es), "
            f"peak memory {self.peak_memory_bytes / 1e6:.0f} MB a process"
        )


@dataclass(frozen=True)
class EncodedBlock:
    """The tokens of a block: `tokens` [sum of lengths], `lengths` int64 [pieces], `ends` bool [pieces]."""

    tokens: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


def mpi_communicator():
    """MPI.COMM_WORLD when this process was started by mpirun with several ranks, else None.

    mpi4py is imported only then. ValueError where it is missing.
    """
    sizes = (os.environ.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    if not any(size.isdigit() and int(size) > 1 for size in sizes):
        return None
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ValueError("started by mpirun, but mpi4py is missing: pip install 'megasparse[mpi]'") from error
    return MPI.COMM_WORLD


def preprocess(
    reader: CorpusReader,
    tokenizer: Tokenizer,
    prefix: str | PathLike[str],
    *,
    communicator=None,
    num_threads: int = 1,
    limit_documents: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PreprocessReport:
    """Writes `<prefix>.bin`, `.idx` and `.meta.json`, replacing them; each document ends with the end token.

    Called by every rank of `communicator`, it raises on all ranks if one fails. `progress` gets the input bytes read
    so far. `limit_documents` stops after that many documents. DatasetError if there are no documents.
    """
    began = time.monotonic()
    blocks = _blocks(reader.segments(cut_check(tokenizer)), limit_documents)
    if communicator is None:
        documents, tokens, input_bytes = _write_alone(blocks, reader, tokenizer, prefix, num_threads, progress)
        ranks, skipped, peak = 1, reader.skipped_files, peak_memory_bytes()
    else:
        documents, tokens, input_bytes = _write_together(
            blocks, reader, tokenizer, prefix, num_threads, progress, communicator
        )
        ranks, skipped = communicator.Get_size(), reader.skipped_files
        peak = max(communicator.allgather(peak_memory_bytes()))
    return PreprocessReport(documents, tokens, input_bytes, time.monotonic() - began, peak, ranks, skipped)


def _write_alone(blocks, reader, tokenizer, prefix, num_threads, progress) -> tuple[int, int, int]:
    input_bytes = 0
    with _writer(prefix, tokenizer) as writer:
        for block in blocks:
            input_bytes += _text_bytes(block)
            encoded = encode_block(block, tokenizer, num_threads)
            writer.add_fragments(encoded.tokens, encoded.lengths, encoded.ends)
            if progress:
                progress(reader.bytes_read)
        _require_documents(writer)
    return writer.num_documents, writer.num_tokens, input_bytes


def _write_together(blocks, reader, tokenizer, prefix, num_threads, progress, communicator) -> tuple[int, int, int]:
    rank, size = communicator.Get_rank(), communicator.Get_size()
    dtype = smallest_dtype(tokenizer.vocab_size)
    folder, outcome = None, None
    error: Exception | None = None
    input_bytes = num_blocks = 0
    try:
        if rank == 0:
            folder = _shard_folder(prefix)
    except OSError as failure:
        error = failure
    folder = communicator.bcast(folder)
    raise_together(communicator, error)
    try:
        with open(_shard_path(folder, rank), "wb") as shard:
            for number, block in enumerate(blocks):
                num_blocks += 1
                if number % size == rank:
                    input_bytes += _text_bytes(block)
                    _write_block(shard, encode_block(block, tokenizer, num_threads), dtype)
                if progress:
                    progress(reader.bytes_read)
    # Anything that ended one rank here would leave the others waiting for it.
    except Exception as failure:
        error = failure
    try:
        raise_together(communicator, error)
        if rank == 0:
            try:
                outcome = _join_shards(prefix, tokenizer, folder, num_blocks, size)
            except Exception as failure:
                error = failure
        raise_together(communicator, error)
    finally:
        _shard_path(folder, rank).unlink(missing_ok=True)
        communicator.Barrier()
        if rank == 0:
            folder.rmdir()
    documents, tokens = communicator.bcast(outcome)
    return documents, tokens, sum(communicator.allgather(input_bytes))


def raise_together(communicator, error: Exception | None) -> None:
    """Raises on every rank if any rank has an error: its own there, DatasetError with the first one elsewhere."""
    if communicator is None:
        if error is not None:
            raise error
        return
    messages = communicator.allgather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise DatasetError(f"rank {rank} failed: {message}")


def _blocks(segments: Iterator[Segment], limit_documents: int | None) -> Iterator[list[Segment]]:
    block, size, documents = [], 0, 0
    for segment in segments:
        block.append(segment)
        size += len(segment.text)
        documents += segment.ends_document
        if documents == limit_documents:
            break
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def encode_block(block: list[Segment], tokenizer: Tokenizer, num_threads: int = 1) -> EncodedBlock:
    """Encodes segments, with the end-of-document token after each one that ends a document."""
    rows = tokenizer.encode_batch([segment.context + segment.text for segment in block], num_threads)
    skipped = {context: len(tokenizer.encode(context)) for context in {segment.context for segment in block}}
    rows = [row[skipped[segment.context] :] for row, segment in zip(rows, block, strict=True)]
    end = np.array([tokenizer.end_of_document_id], np.int32)
    pieces = []
    for row, segment in zip(rows, block, strict=True):
        pieces.append(row)
        if segment.ends_document:
            pieces.append(end)
    ends = np.array([segment.ends_document for segment in block])
    lengths = np.array([len(row) for row in rows], np.int64) + ends
    tokens = np.concatenate(pieces)
    # Shards hold the narrow dtype of the result, where a larger id would become another one unseen.
    if tokens.size and int(tokens.max()) >= tokenizer.vocab_size:
        raise DatasetError(f"{tokenizer.name} gave token id {tokens.max()}; its vocab_size is {tokenizer.vocab_size}")
    return EncodedBlock(tokens, lengths, ends)


def _writer(prefix, tokenizer: Tokenizer) -> IndexedDatasetWriter:
    dtype, facts = smallest_dtype(tokenizer.vocab_size), DataFacts.of(tokenizer)
    return IndexedDatasetWriter(prefix, dtype, vocab_size=tokenizer.vocab_size, facts=facts)


def _require_documents(writer: IndexedDatasetWriter) -> None:
    if writer.num_documents == 0:
        raise DatasetError("the input holds no documents")


def _shard_folder(prefix) -> Path:
    target = dataset_paths(prefix)[0]
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.stem}.", suffix=".shards", dir=target.parent))


def _shard_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}"


def _write_block(shard: IO[bytes], block: EncodedBlock, dtype: np.dtype) -> None:
    np.array([len(block.lengths), len(block.tokens)], np.int64).tofile(shard)
    block.lengths.tofile(shard)
    block.ends.tofile(shard)
    block.tokens.astype(dtype).tofile(shard)


def _read_block(shard: IO[bytes], dtype: np.dtype) -> EncodedBlock:
    pieces, tokens = np.fromfile(shard, np.int64, 2).tolist()
    lengths = np.fromfile(shard, np.int64, pieces)
    ends = np.fromfile(shard, bool, pieces)
    return EncodedBlock(np.fromfile(shard, dtype, tokens), lengths, ends)


def _join_shards(prefix, tokenizer: Tokenizer, folder: Path, num_blocks: int, size: int) -> tuple[int, int]:
    dtype = smallest_dtype(tokenizer.vocab_size)
    shards = [open(_shard_path(folder, rank), "rb") for rank in range(size)]
    try:
        with _writer(prefix, tokenizer) as writer:
            for number in range(num_blocks):
                block = _read_block(shards[number % size], dtype)
                writer.add_fragments(block.tokens, block.lengths, block.ends)
            _require_documents(writer)
    finally:
        for shard in shards:
            shard.close()
    return writer.num_documents, writer.num_tokens


def _text_bytes(block: list[Segment]) -> int:
    return sum(len(text) if text.isascii() else len(text.encode("utf-8")) for text, *_ in block)


def peak_memory_bytes() -> int:
    """The largest resident memory this process has had."""
    # getrusage would also count what the parent held when it started this process, so /proc is asked first.
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
