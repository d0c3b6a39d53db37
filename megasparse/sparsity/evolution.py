"""One topology update, as a pure function: scores and targets in, kept and grown units out.

    results = evolve(layers, step_key, sum_over_shards)

Of each layer the `num_keep` best active units stay; then `num_target - num_keep` of all others (those just dropped
included) come to life: `num_by_gradient` by growth score, the rest at random. Every layer may lie in pieces on several
ranks; all ranks call with the same counts and get the pieces of one global decision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megasparse.sparsity.chunks import positions
from megasparse.sparsity.random import random_scores, random_words
from megasparse.sparsity.selection import INELIGIBLE, SumOverShards, TieKeys, keep_local, select_top_k

# Streams of the counter-based generator.
TIE_STREAM, GROWTH_STREAM, INITIAL_STREAM = 1, 2, 3


@dataclass(frozen=True)
class StepCounts:
    """Units of one layer in one topology update, over all ranks."""

    active: int
    keep: int
    by_gradient: int
    at_random: int

    @property
    def target(self) -> int:
        return self.keep + self.by_gradient + self.at_random


# Layers of one shape and density have the same.
@lru_cache(maxsize=256)
def step_counts(
    num_active: int, num_target: int, num_units: int, drop_fraction: float, gradient_share: float
) -> StepCounts:
    """Counts of a step: n_drop = max(floor(drop_fraction n_active), n_active - n_target), then growth up to the target.

    gradient_share: r / (r + 1) of the grown units are chosen by gradient. A layer whose target is full drops nothing:
    there is nothing to explore, and dropping would only erase weights.
    """
    num_drop = 0 if num_target == num_units else math.floor(drop_fraction * num_active)
    num_drop = max(num_drop, num_active - num_target)
    num_keep = num_active - num_drop
    num_grow = num_target - num_keep
    by_gradient = math.floor(gradient_share * num_grow + 0.5)
    return StepCounts(num_active, num_keep, by_gradient, num_grow - by_gradient)


@dataclass(frozen=True)
class LayerPiece:
    """This rank's piece of one layer; all tensors [n] for the n units of the piece."""

    stream: int
    """Number of the layer, the same on all ranks: its stream of random numbers."""
    indices: Tensor
    """int32 or int64, global index of each unit in the layer."""
    active: Tensor
    """bool."""
    drop_score: Tensor
    """float32, 0 or more."""
    growth_score: Tensor
    """float32, 0 or more."""
    counts: StepCounts
    row_length: int | None = None
    """Units per row where every row is to keep at least one (then the piece is the whole layer)."""


@dataclass(frozen=True)
class Evolved:
    """Disjoint bool masks over the units of a piece; the new topology is their union."""

    kept: Tensor
    grown: Tensor


def evolve(
    layers: Sequence[LayerPiece], seed: int, step: int, sum_over_shards: SumOverShards = keep_local
) -> list[Evolved]:
    """Decide the new topology of all layers at once. See the module for the rule."""
    ties = [_tie_keys(layer.indices, seed, step, layer.stream) for layer in layers]

    def best(scores: list[Tensor], taken: list[Tensor], counts: list[int]) -> list[Tensor]:
        """scores: own copies."""
        scores = [score.index_fill_(0, positions(mask), INELIGIBLE) for score, mask in zip(scores, taken, strict=True)]
        scores = [_prefer_best_of_rows(*each) for each in zip(layers, scores, taken, strict=True)]
        return select_top_k(scores, ties, counts, sum_over_shards)

    kept = _best_active(layers, ties, sum_over_shards)
    growth = [layer.growth_score.clone() for layer in layers]
    by_gradient = best(growth, kept, [layer.counts.by_gradient for layer in layers])
    del growth

    taken = [keep | grown for keep, grown in zip(kept, by_gradient, strict=True)]
    chance = [random_scores(layer.indices, seed, step, layer.stream, GROWTH_STREAM) for layer in layers]
    at_random = best(chance, taken, [layer.counts.at_random for layer in layers])

    return [
        Evolved(keep, gradient | random) for keep, gradient, random in zip(kept, by_gradient, at_random, strict=True)
    ]


def _best_active(layers: Sequence[LayerPiece], ties: Sequence[TieKeys], sum_over_shards: SumOverShards) -> list[Tensor]:
    """The active units that stay. Active ones are few, so only they are handed to the selection."""
    active = [positions(layer.active) for layer in layers]
    scores = [_drop_scores(layer).index_select(0, where) for layer, where in zip(layers, active, strict=True)]
    keys = [_keys_at(tie, where) for tie, where in zip(ties, active, strict=True)]
    chosen = select_top_k(scores, keys, [layer.counts.keep for layer in layers], sum_over_shards)
    return [
        torch.zeros_like(layer.active).index_fill_(0, where[best], True)
        for layer, where, best in zip(layers, active, chosen, strict=True)
    ]


def _drop_scores(layer: LayerPiece) -> Tensor:
    """Drop scores, right where units are active."""
    if layer.row_length is None:
        return layer.drop_score
    return _prefer_best_of_rows(layer, torch.where(layer.active, layer.drop_score, INELIGIBLE), None)


def random_topology(num_units: int, num_target: int, stream: int, seed: int, row_length: int | None = None) -> Tensor:
    """A random start: bool [num_units] with exactly `num_target` active units."""
    indices = torch.arange(num_units)
    nothing = torch.zeros(num_units, dtype=torch.bool)
    chance = random_scores(indices, seed, stream, INITIAL_STREAM)
    piece = LayerPiece(stream, indices, nothing, chance, chance, StepCounts(0, 0, 0, num_target), row_length)
    chance = _prefer_best_of_rows(piece, chance, nothing)
    return select_top_k([chance], [_tie_keys(indices, seed, stream)], [num_target])[0]


def _tie_keys(indices: Tensor, *key: int) -> TieKeys:
    """Keys by global index, so that a tie falls the same way however the layer is divided."""
    return lambda positions: random_words(indices[positions], *key, TIE_STREAM)


def _keys_at(keys: TieKeys, places: Tensor) -> TieKeys:
    """Keys of the units at some positions among `places`."""
    return lambda chosen: keys(places[chosen])


def _prefer_best_of_rows(layer: LayerPiece, score: Tensor, served: Tensor | None) -> Tensor:
    """Raise the best eligible unit of each row without a `served` one above all others."""
    if layer.row_length is None:
        return score
    rows = score.view(-1, layer.row_length)
    value, column = rows.max(dim=1)
    needy = value >= 0
    if served is not None:
        needy &= ~served.view_as(rows).any(dim=1)
    preferred = rows.clone()
    preferred[needy, column[needy]] = torch.inf
    return preferred.reshape(-1)
