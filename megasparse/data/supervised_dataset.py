"""Packs examples of prompt and response into training samples, whole, for data with a loss mask.

    samples = SupervisedDataset(IndexedDataset("data/tasks"), seq_length=1024, vocab_size=50257)
    samples[0]                       # int64 [3, 1025]: tokens, number of the example of each, 1 where it is learned
    samples.target_share(0)          # share of its 1,024 targets that are learned

A sample has room for T + 1 tokens (T = seq_length) and holds whole examples only: each goes, the longest first, where
it leaves the least room (best fit decreasing), which fills all but a few samples. What stays free is an example of its
own, of zeros, which none sees and which has no loss. Packing depends on the lengths of the examples and T alone.
The first token of an example has no loss either: what stands before it belongs to another one.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from megasparse.data.dataset import check_ids
from megasparse.data.index_format import DatasetError
from megasparse.data.indexed import IndexedDataset
from megasparse.data.loader import PADDING_DOCUMENT


class SupervisedDataset:
    """The samples of tokens [start, stop) of a dataset with a loss mask, which must begin and end with a document.

    With `vocab_size` every fetched sample is checked. DatasetError for an example that is longer than a sample, one
    without a token to learn, a mask of other values than 0 and 1, no example at all, and a range that cuts one.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        seq_length: int,
        *,
        start: int = 0,
        stop: int | None = None,
        vocab_size: int | None = None,
    ):
        assert indexed.loss_mask is not None, f"{indexed.prefix} has no loss mask"
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.indexed, self.seq_length, self.vocab_size = indexed, seq_length, vocab_size
        self._mask: IndexedDataset = indexed.loss_mask
        numbers = _documents_in(indexed, start, indexed.num_tokens if stop is None else stop)
        lengths = np.diff(indexed.document_offsets)[numbers]
        _check_lengths(indexed, numbers, lengths, seq_length)
        learned = self._learned(numbers)
        packed = pack(lengths, seq_length + 1)
        self._samples = [numbers[positions] for positions in packed]
        self._shares = [int(learned[positions].sum()) / seq_length for positions in packed]

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> np.ndarray:
        """Sample `index`, 0 <= index < len, as a new int64 array [3, seq_length + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is outside the {len(self)} samples of {self.indexed.prefix}")
        sample = np.zeros((3, self.seq_length + 1), np.int64)
        position = 0
        for place, number in enumerate(self._samples[index].tolist()):
            tokens = self.indexed.document(number).astype(np.int64)
            if self.vocab_size is not None:
                check_ids(self.indexed, tokens, int(self.indexed.document_offsets[number]), self.vocab_size)
            piece = sample[:, position : position + len(tokens)]
            piece[0], piece[1], piece[2] = tokens, place, self._mask.document(number)
            piece[2, 0] = 0
            position += len(tokens)
        sample[1, position:] = PADDING_DOCUMENT
        return sample

    def target_share(self, index: int) -> float:
        """Share of the targets of sample `index` that have a loss."""
        return self._shares[index]

    def _learned(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of each document that have a loss."""
        offsets, mask = self.indexed.document_offsets, self._mask.tokens(0, self._mask.num_tokens)
        if mask.size and int(mask.max()) > 1:
            raise DatasetError(f"{self._mask.bin_path}: holds {mask.max()}; a loss mask must hold 0 and 1")
        starts, last = offsets[numbers], offsets[numbers[-1] + 1]
        # The documents between are empty, so that each sum ends where the next document begins.
        learned = np.add.reduceat(mask[: int(last)], starts, dtype=np.int64) - mask[starts]
        if not learned.all():
            number = int(numbers[np.argmin(learned)])
            raise DatasetError(
                f"{self._mask.bin_path}: document {number} has no token to learn behind its first one; must have one"
            )
        return learned


def _documents_in(indexed: IndexedDataset, start: int, stop: int) -> np.ndarray:
    """Numbers of the documents of tokens [start, stop), empty ones left out."""
    offsets = indexed.document_offsets
    first, last = np.searchsorted(offsets, [start, stop])
    if last >= len(offsets) or offsets[first] != start or offsets[last] != stop:
        raise DatasetError(
            f"{indexed.prefix}: tokens [{start}, {stop}) cut an example; must be whole ones: use more data, or other "
            "shares of it"
        )
    numbers = np.arange(first, last)[np.diff(offsets[first : last + 1]) > 0]
    if not numbers.size:
        raise DatasetError(f"{indexed.prefix}: tokens [{start}, {stop}) hold no example; use more data")
    return numbers


def _check_lengths(indexed: IndexedDataset, numbers: np.ndarray, lengths: np.ndarray, seq_length: int) -> None:
    longest = int(np.argmax(lengths))
    if lengths[longest] > seq_length + 1:
        raise DatasetError(
            f"model.seq_length: {seq_length} holds {seq_length + 1} tokens of an example, and {indexed.prefix} has "
            f"{np.count_nonzero(lengths > seq_length + 1)} longer ones, document {numbers[longest]} with "
            f"{lengths[longest]}; must be at least {lengths[longest] - 1}, or the data written with --max-tokens "
            f"{seq_length + 1} (tools/preprocess_data.py)"
        )


def pack(lengths: np.ndarray, room: int) -> list[np.ndarray]:
    """Positions in `lengths` of what goes into each sample of `room` tokens; see the module header."""
    samples: list[list[int]] = []
    # Samples by the room that they have left, and the rooms that occur, in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for position in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[position])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            left = room
            samples.append([])
            sample = len(samples) - 1
        else:
            left = rooms[at]
            sample = by_room[left].pop()
            if not by_room[left]:
                rooms.pop(at)
        samples[sample].append(position)
        rest = left - length
        if not by_room.setdefault(rest, []):
            insort(rooms, rest)
        by_room[rest].append(sample)
    return [np.array(sample, np.int64) for sample in samples]
