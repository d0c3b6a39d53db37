"""One topology update against the rule written down with sorts, whole and on simulated ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain_selection import best, hashed
from shards import cuts, on_shards

from megasparse.sparsity.evolution import Evolved, LayerPiece, StepCounts, evolve, random_topology, step_counts

SEED, STEP = 42, 300


def plain_step(active, drop, growth, counts: StepCounts, stream: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept and grown units by the rule of the method, on whole arrays, no floor."""
    indices = np.arange(active.size)
    tie = hashed(indices, SEED, STEP, stream, 1)
    chance = (hashed(indices, SEED, STEP, stream, 2) >> np.uint32(8)).astype(np.float32) / 2**24
    kept = best(drop, tie, active, counts.keep)
    grown = best(growth, tie, ~kept, counts.by_gradient)
    grown |= best(chance, tie, ~(kept | grown), counts.at_random)
    return kept, grown


def random_layer(num_units: int, density: float, target: int, zeta: float, share: float, seed: int, ties: bool):
    generator = np.random.default_rng(seed)
    active = generator.random(num_units) < density
    active[0] = True
    drop, growth = (generator.random(num_units).astype(np.float32) for _ in range(2))
    if ties:
        drop, growth = np.floor(drop * 4), np.floor(growth * 3)
    counts = step_counts(int(active.sum()), target, num_units, zeta, share)
    return active, drop.astype(np.float32), growth.astype(np.float32), counts


def piece(layer, stream: int, part: slice = slice(None)) -> LayerPiece:
    active, drop, growth, counts = layer
    indices = np.arange(active.size)
    return LayerPiece(stream, *(torch.from_numpy(a[part].copy()) for a in (indices, active, drop, growth)), counts)


@given(data=st.data(), num_shards=st.integers(1, 6), share=st.sampled_from([0.75, 1.0, 0.0]), ties=st.booleans())
def test_a_step_equals_the_plain_rule_on_any_number_of_ranks(data, num_shards, share, ties) -> None:
    layers, points = [], []
    for number in range(data.draw(st.integers(1, 3))):
        n = data.draw(st.integers(2, 80))
        layers.append(
            random_layer(
                n, data.draw(st.floats(0.05, 1.0)), data.draw(st.integers(1, n)), data.draw(st.floats(0, 0.5)), share,
                seed=data.draw(st.integers(0, 10**6)) + number, ties=ties,
            )
        )  # fmt: skip
        points.append(data.draw(st.lists(st.integers(0, n), min_size=num_shards - 1, max_size=num_shards - 1)))
    pieces = [cuts(layer[0].size, own) for layer, own in zip(layers, points, strict=True)]

    def work(rank, ranks) -> list[Evolved]:
        mine = [piece(layer, i, slice(*pieces[i][rank])) for i, layer in enumerate(layers)]
        return evolve(mine, SEED, STEP, ranks.sum_)

    results = on_shards(num_shards, work)
    for number, (active, drop, growth, counts) in enumerate(layers):
        kept = np.concatenate([result[number].kept.numpy() for result in results])
        grown = np.concatenate([result[number].grown.numpy() for result in results])
        expected_kept, expected_grown = plain_step(active, drop, growth, counts, number)
        assert (kept == expected_kept).all() and (grown == expected_grown).all()
        assert kept.sum() == counts.keep and grown.sum() == counts.by_gradient + counts.at_random
        assert not (kept & grown).any() and (kept <= active).all()


def test_gradient_growth_takes_the_largest_and_random_growth_does_not() -> None:
    n = 2000
    layer = random_layer(n, 0.1, 600, 0.0, 1.0, seed=1, ties=False)
    (by_gradient,) = evolve([piece(layer, 0)], SEED, STEP)
    inactive = torch.from_numpy(~layer[0])
    score = torch.from_numpy(layer[2])
    assert score[by_gradient.grown].min() > score[inactive & ~by_gradient.grown].max()
    random = (*layer[:3], step_counts(int(layer[0].sum()), 600, n, 0.0, 0.0))
    (at_random,) = evolve([piece(random, 0)], SEED, STEP)
    # The mean score of a random draw of some 400 is that of all inactive units, within six standard errors.
    gap = abs(float(score[at_random.grown].mean() - score[inactive].mean()))
    assert gap < 6 * float(score.std()) / int(at_random.grown.sum()) ** 0.5
    assert not torch.equal(evolve([piece(random, 0)], SEED, STEP + 1)[0].grown, at_random.grown)
    assert not torch.equal(evolve([piece(random, 1)], SEED, STEP)[0].grown, at_random.grown)
    assert not torch.equal(evolve([piece(random, 0)], SEED + 1, STEP)[0].grown, at_random.grown)


@given(
    num_units=st.integers(1, 10_000), data=st.data(), zeta=st.floats(0.0, 0.99), share=st.floats(0.0, 1.0)
)  # fmt: skip
def test_counts_follow_the_method(num_units, data, zeta, share) -> None:
    active, target = data.draw(st.integers(1, num_units)), data.draw(st.integers(1, num_units))
    counts = step_counts(active, target, num_units, zeta, share)
    drop = active - counts.keep
    assert counts.target == target and counts.active == active
    assert min(counts.keep, counts.by_gradient, counts.at_random) >= 0
    if target < num_units:
        assert drop == max(math.floor(zeta * active), active - target)
    else:
        assert drop == 0
    assert abs(counts.by_gradient - share * (target - counts.keep)) <= 0.5 + 1e-6


def test_counts_by_hand() -> None:
    assert step_counts(100, 100, 1000, 0.3, 0.75) == StepCounts(100, 70, 23, 7)
    assert step_counts(100, 40, 1000, 0.3, 0.75) == StepCounts(100, 40, 0, 0)
    assert step_counts(100, 90, 1000, 0.3, 0.75) == StepCounts(100, 70, 15, 5)
    assert step_counts(100, 1000, 1000, 0.3, 0.75) == StepCounts(100, 100, 675, 225)


@pytest.mark.parametrize("share", [1.0, 0.75, 0.0])
@pytest.mark.parametrize("keep_fraction", [0.0, 0.3, 0.9])
def test_row_floor_leaves_no_row_empty(share, keep_fraction) -> None:
    rows, columns, target = 16, 8, 20
    generator = torch.Generator().manual_seed(3)
    active = torch.zeros(rows, columns, dtype=torch.bool)
    active[:, 0] = True
    active[0, :5] = True
    # Whole rows with the worst scores: a step without the floor would empty them.
    drop = torch.rand(rows, columns, generator=generator) * torch.linspace(1, 0.01, rows).unsqueeze(1)
    growth = torch.rand(rows, columns, generator=generator) * torch.linspace(1, 0.01, rows).unsqueeze(1)
    keep = math.floor(keep_fraction * 20)
    counts = StepCounts(20, keep, round(share * (target - keep)), (target - keep) - round(share * (target - keep)))
    indices = torch.arange(rows * columns)

    def step(row_length):
        flat = (active.reshape(-1), drop.reshape(-1), growth.reshape(-1))
        (evolved,) = evolve([LayerPiece(0, indices, *flat, counts, row_length)], SEED, STEP)
        assert int(evolved.kept.sum()) == counts.keep
        assert int(evolved.kept.sum() + evolved.grown.sum()) == target
        return (evolved.kept | evolved.grown).view(rows, columns)

    assert step(columns).any(dim=1).all()
    if share == 1.0:
        assert not step(None).any(dim=1).all()


def test_row_floor_keeps_the_best_of_each_row() -> None:
    active = torch.ones(2, 3, dtype=torch.bool)
    drop = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0]])
    counts = StepCounts(6, 3, 0, 0)
    layer = LayerPiece(0, torch.arange(6), active.reshape(-1), drop.reshape(-1), torch.zeros(6), counts, 3)
    (evolved,) = evolve([layer], SEED, STEP)
    assert evolved.kept.view(2, 3).tolist() == [[True, True, False], [False, True, False]]


@pytest.mark.parametrize("row_length", [None, 10])
def test_random_start(row_length) -> None:
    topology = random_topology(200, 25, stream=5, seed=1, row_length=row_length)
    assert int(topology.sum()) == 25
    assert torch.equal(topology, random_topology(200, 25, stream=5, seed=1, row_length=row_length))
    assert not torch.equal(topology, random_topology(200, 25, stream=6, seed=1, row_length=row_length))
    if row_length:
        assert topology.view(20, 10).any(dim=1).all()
    counts = torch.stack([random_topology(200, 100, stream=s, seed=2) for s in range(400)]).double().mean(dim=0)
    # 400 coins per unit: standard deviation 0.025; 200 units stay within five.
    assert float((counts - 0.5).abs().max()) < 0.125
