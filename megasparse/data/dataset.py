"""Cuts a token stream into training samples, and corpora into splits.

Packing rule. Documents are stored one after the other, each with its end-of-document token. The stream of a split is
cut into windows of T + 1 tokens (T = seq_length) that overlap by one: sample i is tokens [i T, i T + T + 1), so
inputs are its first T tokens and targets its last T, and every token but the first is a target exactly once. Windows
cross documents. The tail that does not fill a window is dropped. With `documents=True` a sample also tells the document
of each of its tokens, taken from the index file and not from the end-of-document tokens.

    train, valid = split_documents(indexed, (0.99, 0.01))
    samples = PackedDataset(indexed, seq_length=1024, start=train.start, stop=train.stop, vocab_size=50257)
    samples[0]                                      # int64 [1025]; with documents=True [2, 1025]: tokens, documents
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from megasparse.data.index_format import DatasetError
from megasparse.data.indexed import IndexedDataset


class PackedDataset:
    """The samples of tokens [start, stop) of a dataset, which need not begin or end with a document; see the packing
    rule above. stop: None takes all from `start` on.

    With `vocab_size` every fetched sample is checked, and a token id outside the vocabulary raises `DatasetError`.
    A range shorter than one window raises `DatasetError`.

    documents: samples are int64 [2, seq_length + 1], tokens and below them the number of the document of each.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        *,
        start: int = 0,
        stop: int | None = None,
        vocab_size: int | None = None,
        documents: bool = False,
    ):
        stop = indexed.num_tokens if stop is None else stop
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        if not 0 <= start <= stop <= indexed.num_tokens:
            raise ValueError(f"tokens [{start}, {stop}) are outside the {indexed.num_tokens} of {indexed.prefix}")
        self.indexed, self.start, self.stop, self.documents = indexed, start, stop, documents
        self.seq_length, self.vocab_size = seq_length, vocab_size
        self._length = max(0, (stop - start - 1) // seq_length)
        if self._length == 0:
            raise DatasetError(
                f"{indexed.prefix}: tokens [{start}, {stop}) are {stop - start} tokens; one sample of seq_length "
                f"{seq_length} needs {seq_length + 1}. Use more data, a larger share of it, or a smaller seq_length"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len, as a new int64 array [seq_length + 1], or [2, seq_length + 1]."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} is outside the {self._length} samples of {self.indexed.prefix}")
        first = self.start + int(index) * self.seq_length
        sample = self.indexed.tokens(first, first + self.seq_length + 1).astype(np.int64)
        if self.vocab_size is not None:
            check_ids(self.indexed, sample, first, self.vocab_size)
        return np.stack((sample, self.indexed.documents_of(first, len(sample)))) if self.documents else sample

    def target_share(self, index: int) -> None:
        """None: every target of a sample counts."""


class ConcatenatedDataset:
    """Several datasets one after the other, with random access and no shuffling."""

    def __init__(self, datasets: Sequence):
        if not datasets:
            raise ValueError("no datasets to concatenate")
        self.datasets = list(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside the {len(self)} samples")
        which, own = self._locate(index)
        return self.datasets[which][own]

    def target_share(self, index: int) -> float | None:
        """Share of the targets of sample `index` that have a loss; None: all."""
        which, own = self._locate(index)
        return self.datasets[which].target_share(own)

    def _locate(self, index: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return which, index - (int(self._ends[which - 1]) if which else 0)


def check_ids(indexed: IndexedDataset, tokens: np.ndarray, first: int, vocab_size: int) -> None:
    """Raise DatasetError for an id outside the vocabulary. tokens: int64, of the dataset from token `first` on."""
    # Seen as unsigned, negative ids are huge: one pass finds both kinds of bad id.
    if int(tokens.view(np.uint64).max()) < vocab_size:
        return
    offset = int(np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0])
    position = first + offset
    raise DatasetError(
        f"{indexed.bin_path}: token id {tokens[offset]} at token {position} "
        f"(document {indexed.document_at(position)}); ids must be 0 to {vocab_size - 1} "
        f"(vocab_size {vocab_size}). Was the data written with another tokenizer?"
    )


def split_documents(indexed: IndexedDataset, fractions: Sequence[float]) -> list[range]:
    """Cuts a dataset into contiguous splits (train, valid, ...) of whole documents: ranges of tokens.

    `fractions` are relative sizes, normalised here; a zero gives an empty range. Each cut is the document boundary
    nearest to the wanted token offset that leaves at least one document to every split. A dataset with fewer
    documents than splits is cut inside documents, at exactly the wanted tokens, with a warning. A warning also
    tells of a split that, for want of a boundary, is less than half or more than twice as large as wanted.
    """
    shares = _normalised(fractions)
    wanted = [k for k, share in enumerate(shares) if share > 0]
    if indexed.num_tokens < len(wanted):
        raise DatasetError(
            f"{indexed.prefix}: {indexed.num_documents} documents with {indexed.num_tokens} tokens cannot be cut "
            f"into {len(wanted)} non-empty splits"
        )
    boundaries = np.unique(indexed.document_offsets)
    if len(boundaries) - 1 < len(wanted):
        warnings.warn(
            f"{indexed.prefix}: {len(boundaries) - 1} non-empty document(s) for {len(wanted)} splits; "
            "the splits are cut inside a document",
            stacklevel=2,
        )
        cut_points = None
    else:
        cut_points = boundaries
    cuts = _nearest_cuts(np.cumsum([shares[k] for k in wanted])[:-1], indexed.num_tokens, cut_points)
    edges = [0, *cuts, indexed.num_tokens]
    ranges, used = [], 0
    for share in shares:
        ranges.append(range(edges[used], edges[used + 1] if share > 0 else edges[used]))
        used += share > 0
    for share, piece in zip(shares, ranges, strict=True):
        actual = len(piece) / indexed.num_tokens
        if share > 0 and not share / 2 <= actual <= share * 2:
            warnings.warn(
                f"{indexed.prefix}: a split of {share:.2%} of the tokens became {actual:.2%}, as documents are not cut",
                stacklevel=2,
            )
    return ranges


def _normalised(fractions: Sequence[float]) -> list[float]:
    values = [float(value) for value in fractions]
    if not values or not all(np.isfinite(values)) or min(values) < 0 or sum(values) <= 0:
        raise ValueError(f"split fractions {list(fractions)}: they must be finite, not negative, and not all zero")
    return [value / sum(values) for value in values]


def _nearest_cuts(targets: np.ndarray, num_tokens: int, cut_points: np.ndarray | None) -> list[int]:
    """Increasing cuts nearest to `targets` (cumulative shares), each piece non-empty. `None`: any token is a cut."""
    last = num_tokens if cut_points is None else len(cut_points) - 1
    cuts, previous = [], 0
    for k, target in enumerate(targets):
        offset = target * num_tokens
        if cut_points is None:
            index = round(offset)
        else:
            right = min(max(int(np.searchsorted(cut_points, offset)), 1), last)
            left_is_nearer = offset - cut_points[right - 1] <= cut_points[right] - offset
            index = right - 1 if left_is_nearer else right
        previous = min(max(index, previous + 1), last - (len(targets) - k))
        cuts.append(previous if cut_points is None else int(cut_points[previous]))
    return cuts
