"""Permutations, blending, and batches that do not depend on the layout."""

from __future__ import annotations

import threading
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megasparse.data import (
    BatchLoader,
    BlendedDataset,
    ShuffledDataset,
    derive_seed,
    permuted_index,
)


class Numbers:
    """An endless dataset whose sample n is [n, n, n]."""

    def __init__(self, size=10**9):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, number):
        return np.full(3, number, np.int64)


def permuted(size: int, seed: int, epoch: int = 0) -> np.ndarray:
    return np.array([permuted_index(position, size, seed, epoch) for position in range(size)])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_permutation_is_a_bijection(size, seed, epoch):
    images = permuted(size, seed, epoch)
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**62), st.integers(0, 2**64), st.integers(0, 99), st.data())
def test_images_of_any_size_lie_inside(size, seed, epoch, data):
    assert 0 <= permuted_index(data.draw(st.integers(0, size - 1)), size, seed, epoch) < size


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, 64, 100])
def test_permutations_are_roughly_uniform(size):
    # Chi-square of where each of three positions goes, over 4000 seeds. Mean size - 1, deviation sqrt(2 (size - 1));
    # five deviations make a false alarm rarer than 1 in 10^4 over all cases even in the skewed tail of few cells.
    for position in {0, size // 2, size - 1}:
        images = [permuted_index(position, size, seed) for seed in range(4000)]
        counts = np.bincount(images, minlength=size)
        expected = 4000 / size
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < size - 1 + 5 * np.sqrt(2 * (size - 1)) + 10


def test_permutation_has_no_visible_order():
    size = 10_007
    images = permuted(size, seed=3)
    # Correlations of a random order have deviation 1 / sqrt(size) = 0.01.
    assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.05
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
    # Fixed points of random permutations are Poisson distributed with mean 1.
    assert np.count_nonzero(images == np.arange(size)) < 10


def test_epochs_and_seeds_give_other_orders():
    orders = {tuple(permuted(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert derive_seed(1, 2) != derive_seed(2, 1) and 0 <= derive_seed(-5) < 2**63


@pytest.mark.parametrize("index, size", [(-1, 5), (5, 5)])
def test_position_outside(index, size):
    with pytest.raises(IndexError):
        permuted_index(index, size, 0)


@pytest.mark.parametrize("size", [0, -3, 2**63])
def test_illegal_size(size):
    with pytest.raises(ValueError, match="size is"):
        permuted_index(0, size, 0)


def test_shuffled_dataset_sees_every_sample_once_an_epoch():
    shuffled = ShuffledDataset(Numbers(37), seed=5)
    orders = [[int(shuffled[epoch * 37 + k][0]) for k in range(37)] for epoch in range(3)]
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    with pytest.raises(IndexError):
        shuffled[-1]


WEIGHTS = [
    [1.0],
    [0.5, 0.5],
    [0.7, 0.2, 0.1],
    [1 / 3, 1 / 3, 1 / 3],
    [5, 0.003, 2, 1e-4],
    [1, 1e-6, 1e-6],
    list(range(1, 30)),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_stay_within_one_of_the_weights(weights):
    blend = BlendedDataset([Numbers() for _ in weights], weights, seed=0)
    shares = np.array(weights) / sum(weights)
    before = np.zeros(len(weights), np.int64)
    for blocks in [*range(1, 60), 999, 123_456]:
        counts = np.array(blend.cumulative_counts(blocks))
        draws = blocks * blend.block_length
        assert counts.sum() == draws
        assert np.abs(counts - shares * draws).max() < 1 + 1e-6
        assert (counts >= before).all()
        before = counts


def test_counts_are_those_of_largest_remainder():
    # The sum, 23, is prime, so no two remainders are equal before block 23.
    weights = [7, 2, 1, 3, 10]
    blend = BlendedDataset([Numbers() for _ in weights], weights, seed=0)
    for blocks in range(1, 23):
        draws = blocks * blend.block_length
        quotas = [Fraction(weight, sum(weights)) * draws for weight in weights]
        floors = [quota.numerator // quota.denominator for quota in quotas]
        by_remainder = sorted(range(len(weights)), key=lambda i: floors[i] - quotas[i])
        assert len({floors[i] - quotas[i] for i in range(5)}) == 5
        for i in by_remainder[: draws - sum(floors)]:
            floors[i] += 1
        assert blend.cumulative_counts(blocks) == floors


def test_blocks_hold_the_counts_and_skip_no_sample():
    weights = [0.7, 0.2, 0.1003]
    blend = BlendedDataset([Numbers() for _ in weights], weights, seed=9)
    drawn = [[] for _ in weights]
    for number in range(4 * blend.block_length):
        which, sample = blend.locate(number)
        drawn[which].append(sample)
        if (number + 1) % blend.block_length == 0:
            counts = blend.cumulative_counts((number + 1) // blend.block_length)
            assert [sorted(samples) for samples in drawn] == [list(range(count)) for count in counts]
    # The sources are mixed, not one after the other: in 1000 draws of share 0.7 the longest run stays short.
    sources = [blend.locate(number)[0] for number in range(1000)]
    longest = run = 0
    for left, right in zip(sources, sources[1:], strict=False):
        run = run + 1 if left == right else 0
        longest = max(longest, run)
    assert longest < 60


def test_random_access_equals_walking_through():
    blend = BlendedDataset([ShuffledDataset(Numbers(50), 1), ShuffledDataset(Numbers(70), 2)], [0.4, 0.6], seed=3)
    walked = [int(blend[number][0]) for number in range(3000)]
    order = np.random.default_rng().permutation(3000)
    assert [int(blend[int(number)][0]) for number in order] == [walked[number] for number in order]


def test_tiny_weight_is_drawn_at_its_rate():
    blend = BlendedDataset([Numbers(), Numbers()], [1.0, 1e-9], seed=0)
    assert blend.cumulative_counts(3)[1] == 3 and blend.block_length >= 10**9
    assert blend.locate(10**12)[0] in (0, 1)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -2.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weight"):
        BlendedDataset([Numbers(), Numbers()], weights, seed=0)


def steps_of(size, micro, num_steps, consumed=0, global_batch=24):
    """The samples of each step, as a list of per-rank lists in order."""
    loaders = [
        BatchLoader(
            Numbers(),
            global_batch_size=global_batch,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=size,
            consumed_samples=consumed,
        )
        for rank in range(size)
    ]
    steps = []
    for _ in range(num_steps):
        samples = []
        for micro_step in range(global_batch // (micro * size)):
            for loader in loaders:
                batch = next(loader)
                assert batch.shape == (micro, 3) and str(batch.dtype) == "torch.int64"
                samples += batch[:, 0].tolist()
            assert micro_step < loaders[0].accumulation_steps
        steps.append(samples)
    assert all(loader.consumed_samples == consumed + num_steps * global_batch for loader in loaders)
    for loader in loaders:
        loader.close()
    return steps


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_a_step_has_the_same_samples_in_every_layout(size, micro):
    # Walking micro-steps, then ranks, gives even the same order.
    assert steps_of(size, micro, 3) == [list(range(24 * s, 24 * s + 24)) for s in range(3)]


def test_micro_batches_may_differ_from_step_to_step():
    settings = {"global_batch_size": 8, "data_parallel_size": 2, "num_steps": 4}
    loaders = [
        BatchLoader(Numbers(), micro_batch_size=lambda step: 1 + step % 2, data_parallel_rank=rank, **settings)
        for rank in range(2)
    ]
    for step, size in enumerate((1, 2, 1, 2)):
        assert {(loader.micro_batch_size, loader.accumulation_steps) for loader in loaders} == {(size, 4 // size)}
        batches = [next(loader)[:, 0].tolist() for _ in range(4 // size) for loader in loaders]
        assert all(len(batch) == size for batch in batches)
        assert sum(batches, []) == list(range(8 * step, 8 * step + 8))
    for loader in loaders:
        loader.close()


def test_resuming_in_another_layout_continues_the_order():
    whole = steps_of(2, 3, 6)
    assert whole == steps_of(4, 2, 2) + steps_of(1, 6, 4, consumed=48)


def test_position_counts_finished_steps_only_and_ignores_prefetch():
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 2}
    with BatchLoader(Numbers(), **settings, consumed_samples=40, prefetch=8) as loader:
        assert loader.consumed_samples == 40
        next(loader)
        assert loader.consumed_samples == 40
        next(loader)
        assert loader.consumed_samples == 48


def test_num_steps_ends_the_iterator():
    loader = BatchLoader(
        Numbers(), global_batch_size=4, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1, num_steps=3
    )
    assert [batch[0, 0].item() for batch in loader] == [0, 2, 4, 6, 8, 10]
    with pytest.raises(StopIteration):
        next(loader)


class Failing(Numbers):
    def __getitem__(self, number):
        if number == 5:
            raise RuntimeError("sample 5 is broken")
        return super().__getitem__(number)


def test_an_exception_of_the_dataset_reaches_the_consumer_in_order():
    threads = threading.active_count()
    with BatchLoader(
        Failing(), global_batch_size=2, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1
    ) as loader:
        assert next(loader)[:, 0].tolist() == [0, 1]
        assert next(loader)[:, 0].tolist() == [2, 3]
        with pytest.raises(RuntimeError, match="sample 5 is broken"):
            next(loader)
        assert loader.consumed_samples == 4
    assert threading.active_count() == threads


def test_close_ends_the_thread_even_with_a_full_queue():
    threads = threading.active_count()
    loader = BatchLoader(
        Numbers(), global_batch_size=1, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1, prefetch=1
    )
    next(loader)
    loader.close()
    loader.close()
    assert threading.active_count() == threads
    with pytest.raises(StopIteration):
        next(loader)


class Slow(Numbers):
    """A dataset that makes its samples a second after `closing`."""

    def __init__(self, closing: threading.Event) -> None:
        super().__init__()
        self.closing = closing

    def __getitem__(self, number):
        self.closing.wait()
        time.sleep(1)
        return super().__getitem__(number)


def test_close_from_another_thread_ends_a_waiting_consumer():
    closing = threading.Event()
    loader = BatchLoader(
        Slow(closing), global_batch_size=1, micro_batch_size=1, data_parallel_rank=0, data_parallel_size=1
    )

    def close() -> None:
        closing.set()
        loader.close()

    closer = threading.Timer(0.2, close)
    closer.start()
    with pytest.raises(StopIteration):
        next(loader)
    closer.join()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"global_batch_size": 10}, r"multiple of .* = 2 \* 4 = 8, for example 8 or 16"),
        ({"global_batch_size": 4}, "= 8, for example 8"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0"),
        ({"data_parallel_rank": 4}, "must be 0 to 3"),
        ({"consumed_samples": -1}, "consumed_samples is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
    ],
)
def test_bad_batch_settings(changes, message):
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 4}
    with pytest.raises(ValueError, match=message):
        BatchLoader(Numbers(), **{**settings, **changes})
