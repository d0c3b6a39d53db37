"""The order in which samples are seen: shuffling, blending of sources, and batches for each data-parallel rank.

Everything is a pure function of a *global sample number* n = 0, 1, 2, ..., which counts the samples that the whole
run has consumed. World size, rank and micro-batch size do not enter, so a run may stop and go on in another layout.

    blend = BlendedDataset([ShuffledDataset(web, seed=1), ShuffledDataset(code, seed=2)], [0.9, 0.1], seed=3)
    with BatchLoader(blend, global_batch_size=512, micro_batch_size=4, data_parallel_rank=0,
                     data_parallel_size=8, consumed_samples=0) as loader:
        tokens_BT = next(loader)                    # int64 [micro_batch_size, seq_length + 1]

Shuffling draws no random numbers and keeps no table: a Feistel network over [0, 4^h), the smallest such domain that
holds the dataset, is a seeded permutation of it; values outside the dataset are sent through again until they fall
inside ("cycle walking", Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Mixing is the finalizer of
splitmix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MASK_64 = 2**64 - 1
# Six rounds are ample on wide halves; on halves of few bits, with few distinct round functions, more are needed.
NUM_ROUNDS = 8
MIN_HALF_BITS = 3


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def derive_seed(*parts: int) -> int:
    """One 63-bit seed from several integers, for independent streams."""
    state = 0
    for part in parts:
        state = _mix(state ^ _mix(part & MASK_64))
    return state >> 1


def _round_keys(seed: int, epoch: int) -> list[int]:
    base = derive_seed(seed, epoch)
    return [_mix(base + k) for k in range(NUM_ROUNDS)]


def _half_bits(size: int) -> int:
    return max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)


def permuted_index(index: int, size: int, seed: int, epoch: int = 0) -> int:
    """Where position `index` of [0, size) goes under the permutation of (seed, epoch). Constant expected time."""
    if size < 1 or size > 2**62:
        raise ValueError(f"size is {size}; it must be from 1 to 2**62")
    if not 0 <= index < size:
        raise IndexError(f"position {index} is outside [0, {size})")
    keys, half = _round_keys(seed, epoch), _half_bits(size)
    shift = 64 - half
    mask = (1 << half) - 1
    value = int(index)
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> shift)
        value = (left << half) | right
        if value < size:
            return value


class ShuffledDataset:
    """Endless epochs of a dataset, each in its own order: sample n is position n mod size of epoch n // size.

    `len` is one epoch; any n >= 0 is allowed.
    """

    def __init__(self, dataset, seed: int):
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def sample_index(self, number: int) -> int:
        """The index in the dataset of global sample `number`."""
        if number < 0:
            raise IndexError(f"global sample number {number} is negative")
        epoch, position = divmod(int(number), len(self.dataset))
        return permuted_index(position, len(self.dataset), self.seed, epoch)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.dataset[self.sample_index(number)]

    def target_share(self, number: int) -> float | None:
        """Share of the targets of sample `number` that have a loss; None: all."""
        return self.dataset.target_share(self.sample_index(number))


class BlendedDataset:
    """Mixes endless datasets in fixed proportions.

    Sample numbers are taken in blocks of `block_length`. After m blocks dataset i has been drawn c_i(m) times, where
    c(m) shares m * block_length by largest remainder, so c_i(m) is always within 1 of weight_i * m * block_length.
    Block m draws samples c_i(m), ..., c_i(m + 1) - 1 of each dataset i, all in an order permuted by (seed, m); so no
    sample number of a dataset is skipped or repeated. The block is `BLOCK_LENGTH` long, or longer where the smallest
    weight would not give one draw per block: shares would then not always grow from one block to the next.
    """

    BLOCK_LENGTH = 1000
    # Weights become integers of this sum, so that shares are exact for any sample number.
    WEIGHT_SCALE = 2**53

    def __init__(self, datasets: Sequence, weights: Sequence[float], seed: int):
        if len(datasets) != len(weights) or not datasets:
            raise ValueError(f"{len(datasets)} datasets and {len(weights)} weights; give one weight to each dataset")
        for position, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight {position} is {weight}; weights must be finite and greater than 0")
        total = math.fsum(weights)
        self.datasets, self.seed = list(datasets), seed
        self.weights = [weight / total for weight in weights]
        self._parts = [max(1, round(weight * self.WEIGHT_SCALE)) for weight in self.weights]
        self.block_length = max(self.BLOCK_LENGTH, -(-sum(self._parts) // min(self._parts)))
        self._block: tuple[int, list[int], list[int]] = (-1, [], [])

    def __len__(self) -> int:
        """Samples until the first dataset has been seen once, about: min over datasets of size / weight."""
        return max(1, int(min(len(data) / weight for data, weight in zip(self.datasets, self.weights, strict=True))))

    def cumulative_counts(self, num_blocks: int) -> list[int]:
        """Draws from each dataset in the first `num_blocks` blocks; their sum is num_blocks * block_length."""
        draws, scale = num_blocks * self.block_length, sum(self._parts)
        counts = [draws * part // scale for part in self._parts]
        remainders = [draws * part % scale for part in self._parts]
        by_remainder = sorted(range(len(counts)), key=lambda i: (-remainders[i], i))
        for i in by_remainder[: draws - sum(counts)]:
            counts[i] += 1
        return counts

    def locate(self, number: int) -> tuple[int, int]:
        """(dataset, its global sample number) of global sample `number`."""
        if number < 0:
            raise IndexError(f"global sample number {number} is negative")
        block, position = divmod(int(number), self.block_length)
        before, after = self._counts_around(block)
        slot = permuted_index(position, self.block_length, self.seed, block)
        for which, (start, stop) in enumerate(zip(before, after, strict=True)):
            if slot < stop - start:
                return which, start + slot
            slot -= stop - start
        raise AssertionError("the counts of a block sum to its length")

    def _counts_around(self, block: int) -> tuple[list[int], list[int]]:
        cached, before, after = self._block
        if cached != block:
            before, after = self.cumulative_counts(block), self.cumulative_counts(block + 1)
            self._block = (block, before, after)
        return before, after

    def __getitem__(self, number: int) -> np.ndarray:
        which, sample = self.locate(number)
        return self.datasets[which][sample]

    def target_share(self, number: int) -> float | None:
        """Share of the targets of sample `number` that have a loss; None: all."""
        which, sample = self.locate(number)
        return self.datasets[which].target_share(sample)
