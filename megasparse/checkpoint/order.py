"""The order in which the entries of a parameter are saved, so that every layout finds its part in few long runs.

    runs = fragment_runs(spec, rank, start, numel)          # of a rank's fragment: what to write, and where it stands
    read = FragmentOrder(spec, rank, start, numel)          # the same for reading, at any other layout

A fragment is entries [start, start + numel) of a tensor-parallel rank's shard, flattened. Parameters that are whole
everywhere, or divided by rows, are saved in their own row-major order: a shard is a run for each fused part. A matrix
that is divided by columns is saved in bands of columns, one after another, each row-major: a shard is a run for each of
its bands. So that any usual number of ranks divides them, there are up to `BANDS` bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm, prod

import torch
from torch import Tensor

from megasparse.parallel import ShardSpec

BANDS = 48
"""Bands of a matrix that is divided by columns, at most: 1, 2, 3, 4, 6, 8, 12, 16, 24 and 48 ranks divide them."""


@dataclass(frozen=True)
class Run:
    """Entries [start, start + numel) in the saved order."""

    start: int
    numel: int

    @property
    def end(self) -> int:
        return self.start + self.numel


def band_count(spec: ShardSpec) -> int:
    """Bands of a parameter; 1 where it is saved in its own order."""
    if spec.dim != 1:
        return 1
    columns = spec.shape[1]
    return lcm(gcd(columns, BANDS), spec.size)


def split(spec: ShardSpec, rank: int, start: int, flat: Tensor, bands: int) -> list[tuple[Run, Tensor]]:
    """The runs of a fragment with their entries. flat: [numel], the entries from `start` on of the rank's shard.

    bands: as ``band_count`` gives it for the layout that writes.
    """
    if flat.numel() == 0:
        return []
    if spec.dim != 1:
        return [(run, flat[at : at + run.numel]) for run, at in _row_runs(spec, rank, start, flat.numel())]
    rows, columns = spec.local_shape
    width = spec.shape[1] // bands
    first, last = start // columns, (start + flat.numel() - 1) // columns
    # Whole rows, so that bands can be cut out; what does not belong to the fragment is cut off again.
    before = start - first * columns
    padded = torch.nn.functional.pad(flat, (before, (last + 1) * columns - start - flat.numel()))
    blocks = padded.view(last - first + 1, columns // width, width)
    end = start + flat.numel() - last * columns
    found = []
    for number in range(columns // width):
        head = min(max(before - number * width, 0), width)
        tail = (last - first) * width + min(max(end - number * width, 0), width)
        if head < tail:
            band = rank * columns // width + number
            entries = blocks[:, number].reshape(-1)[head:tail]
            found.append((Run(band * rows * width + first * width + head, tail - head), entries))
    return found


class FragmentOrder:
    """Where the entries of a fragment stand in the saved order of a parameter of `bands` bands.

    runs: what must be read. assemble: the fragment from what was read of each run, in that order.
    """

    def __init__(self, spec: ShardSpec, rank: int, start: int, numel: int, bands: int) -> None:
        assert 0 <= start and start + numel <= prod(spec.local_shape), f"{start}, {numel} of {spec}"
        self._spec, self._start, self._numel = spec, start, numel
        if spec.dim != 1 or numel == 0:
            self.runs = [run for run, _ in _row_runs(spec, rank, start, numel)]
            return
        rows, columns = spec.local_shape
        width = spec.shape[1] // bands
        self._first, self._last, self._width = start // columns, (start + numel - 1) // columns, width
        # Bands of the shard's columns; where they do not divide it, those that it begins and ends in too.
        first_column, end_column = rank * columns, (rank + 1) * columns
        self._bands = range(first_column // width, -(-end_column // width))
        self._skipped = first_column - self._bands.start * width
        # Of the first and the last row of a band, what lies before and after the fragment is left out: other ranks'
        # files may hold it.
        before, end = start - self._first * columns, start + numel - self._last * columns
        self._cuts: list[tuple[int, int]] = []
        self.runs = []
        for band in self._bands:
            left = band * width - first_column
            head = min(max(before - left, 0), width)
            tail = (self._last - self._first) * width + min(max(end - left, 0), width)
            self._cuts.append((head, tail))
            if head < tail:
                self.runs.append(Run(band * rows * width + self._first * width + head, tail - head))

    def assemble(self, pieces: list[Tensor]) -> Tensor:
        """[numel], in the order of the shard."""
        if self._spec.dim != 1 or self._numel == 0:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)
        columns = self._spec.local_shape[1]
        total, read = (self._last - self._first + 1) * self._width, iter(pieces)
        bands = [
            torch.nn.functional.pad(next(read), (head, total - tail)) if head < tail else pieces[0].new_zeros(total)
            for head, tail in self._cuts
        ]
        whole = torch.cat([band.view(-1, self._width) for band in bands], dim=1)[
            :, self._skipped : self._skipped + columns
        ]
        offset = self._start - self._first * columns
        return whole.reshape(-1)[offset : offset + self._numel]


def _row_runs(spec: ShardSpec, rank: int, start: int, numel: int) -> list[tuple[Run, int]]:
    """Runs of a fragment in row-major order, each with where it begins in the fragment."""
    row = prod(spec.shape[1:])
    if spec.dim is None:
        return [(Run(start, numel), 0)] if numel else []
    found, local, whole = [], 0, 0
    for part in spec.divided_parts:
        share = part // spec.size * row
        begin, end = max(start, local), min(start + numel, local + share)
        if begin < end:
            found.append((Run(whole + rank * share + begin - local, end - begin), begin - start))
        local, whole = local + share, whole + part * row
    return found
