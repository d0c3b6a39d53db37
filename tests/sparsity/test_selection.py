"""The radix select against a sort: exactly k, ties by key, however the scores are divided over ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import cuts, on_shards

from megasparse.sparsity.random import random_words
from megasparse.sparsity.selection import INELIGIBLE, select_top_k


def by_sorting(score: torch.Tensor, key: torch.Tensor, count: int) -> torch.Tensor:
    pairs = [(float(s), int(k), i) for i, (s, k) in enumerate(zip(score, key, strict=True)) if s >= 0]
    chosen = torch.zeros(score.numel(), dtype=torch.bool)
    for _, _, index in sorted(pairs, reverse=True)[:count]:
        chosen[index] = True
    return chosen


def keys_for(numel: int, layer: int) -> torch.Tensor:
    return random_words(torch.arange(numel), 7, layer)


def on_pieces(scores, keys, counts, points) -> list[torch.Tensor]:
    """The same selection with every layer cut at its own points; the pieces put together again."""
    num_shards = len(points[0]) + 1
    pieces = [cuts(score.numel(), own) for score, own in zip(scores, points, strict=True)]

    def work(rank, ranks):
        mine = [slice(*piece[rank]) for piece in pieces]
        return select_top_k(
            [score[part] for score, part in zip(scores, mine, strict=True)],
            [key[part].__getitem__ for key, part in zip(keys, mine, strict=True)],
            counts,
            ranks.sum_,
        )

    results = on_shards(num_shards, work)
    return [torch.cat([result[layer] for result in results]) for layer in range(len(scores))]


special = st.sampled_from([0.0, -0.0, INELIGIBLE, float("inf"), 1.0, 1.0000001, 1e-45, 1e-38, 3.4e38])
score_lists = st.lists(st.one_of(special, st.floats(0, 2.0**100, width=32)), min_size=1, max_size=60)


@given(data=st.data(), num_shards=st.integers(1, 8), layers=st.lists(score_lists, min_size=1, max_size=4))
def test_selection_equals_sorting(data, num_shards, layers) -> None:
    scores = [torch.tensor(layer, dtype=torch.float32) for layer in layers]
    keys = [keys_for(score.numel(), number) for number, score in enumerate(scores)]
    counts = [data.draw(st.integers(0, int((score >= 0).sum()))) for score in scores]
    points = [
        data.draw(st.lists(st.integers(0, s.numel()), min_size=num_shards - 1, max_size=num_shards - 1)) for s in scores
    ]
    found = on_pieces(scores, keys, counts, points)
    for score, key, count, chosen in zip(scores, keys, counts, found, strict=True):
        assert int(chosen.sum()) == count
        assert torch.equal(chosen, by_sorting(score, key, count))


@pytest.mark.parametrize("num_shards", [1, 2, 5, 8])
def test_many_scores_with_many_ties(num_shards) -> None:
    generator = torch.Generator().manual_seed(num_shards)
    scores = [
        torch.rand(4000, generator=generator),
        (torch.rand(3000, generator=generator) * 8).floor(),
        torch.zeros(2000),
        torch.full((1000,), 0.125),
        torch.cat([torch.full((300,), float("inf")), torch.rand(200, generator=generator)]),
    ]
    keys = [keys_for(score.numel(), number) for number, score in enumerate(scores)]
    counts = [1234, 1500, 777, 999, 100]
    points = [[int(p) for p in torch.randint(0, s.numel(), (num_shards - 1,), generator=generator)] for s in scores]
    for score, key, count, chosen in zip(scores, keys, counts, on_pieces(scores, keys, counts, points), strict=True):
        assert torch.equal(chosen, by_sorting(score, key, count))


def test_nothing_all_and_empty_shards() -> None:
    scores = [torch.rand(10), torch.rand(10), torch.zeros(0)]
    keys = [keys_for(10, 0), keys_for(10, 1), keys_for(0, 2)]
    points = [[0, 0, 10], [5, 5, 5], [0, 0, 0]]
    nothing, everything, empty = on_pieces(scores, keys, [0, 10, 0], points)
    assert not nothing.any() and everything.all() and empty.numel() == 0


def test_asking_for_too_many_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="more units asked for than eligible"):
        select_top_k([torch.tensor([1.0, INELIGIBLE])], [keys_for(2, 0).__getitem__], [2])


def test_histograms_are_all_that_is_exchanged() -> None:
    """At most six sums of layers x 2,048 numbers, whatever the number of weights; three where nothing ties."""
    sizes = []
    scores = [torch.rand(50_000), torch.rand(20_000)]
    keys = [keys_for(50_000, 0), keys_for(20_000, 1)]
    select_top_k(scores, [key.__getitem__ for key in keys], [5000, 2000], lambda tensor: sizes.append(tensor.numel()))
    assert len(sizes) <= 6 and max(sizes) <= 2 * 2048
