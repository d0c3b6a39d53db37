"""Exact global top-k over scores that lie in pieces on many ranks, without gathering them.

    chosen = select_top_k(scores, tie_keys, counts, sum_over_shards)

Non-negative float32 values order like their bit patterns, so a radix select finds the k-th largest: three rounds of
at most 2,048 bins over the 32 bits of the score, then, only where scores tie at the threshold, three over a 32-bit key
of the global index. A round sums one histogram of all layers over the shards; nothing else is exchanged. The keys are
unique, so the result is exactly k units and does not depend on how they are divided over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megasparse.sparsity.chunks import chunks, positions

INELIGIBLE = -1.0
"""Score of a unit that may not be chosen."""

INFINITY_BITS = 0x7F800000
"""Bit pattern of the largest score."""

# (shift, bits) of each round: 11 + 11 + 10 bits.
ROUNDS = ((21, 11), (10, 11), (0, 10))

SumOverShards = Callable[[Tensor], None]
TieKeys = Callable[[Tensor], Tensor]
"""Keys of the units at some positions of a piece: int64 [m] to int64 [m]. Asked for only where scores tie."""


def keep_local(_: Tensor) -> None:
    """The sum over shards of a process that holds everything."""


def select_top_k(
    scores: Sequence[Tensor],
    tie_keys: Sequence[TieKeys],
    counts: Sequence[int],
    sum_over_shards: SumOverShards = keep_local,
) -> list[Tensor]:
    """Mark, for each layer, the `counts[layer]` highest scores over all shards.

    scores: per layer float32 [n], this shard's, 0 or more, or INELIGIBLE. tie_keys: per layer a function from
    positions in [0, n) to keys in [0, 2^32), different for every unit of the layer; among equal scores the higher wins.
    counts: at most the number of eligible units over all shards. sum_over_shards: adds an int32 tensor over the
    shards, in place. Returns per layer bool [n].
    """
    chosen = [torch.zeros(score.numel(), dtype=torch.bool, device=score.device) for score in scores]
    remaining = list(counts)
    if not any(remaining):
        return chosen
    # The first round looks at all units, the others only at those that may still be chosen.
    (shift, bits), *later = ROUNDS
    thresholds = _thresholds([_histogram_of_scores(score, shift, bits) for score in scores], remaining, sum_over_shards)
    candidates = [_at_least(score, bin_ << shift) for score, (bin_, *_) in zip(scores, thresholds, strict=True)]
    digits = [_bits(score.index_select(0, where)) for score, where in zip(scores, candidates, strict=True)]
    _resolve(digits, candidates, chosen, remaining, thresholds, shift, bits)
    _radix_rounds(later, digits, candidates, chosen, remaining, sum_over_shards)
    # Every rank sees the same sums, so all of them enter the rounds for ties or none does.
    if any(remaining):
        digits = [keys(where) for keys, where in zip(tie_keys, candidates, strict=True)]
        _radix_rounds(ROUNDS, digits, candidates, chosen, remaining, sum_over_shards)
    assert not any(remaining), "more units asked for than eligible, or tie keys that repeat"
    return chosen


def _histogram_of_scores(score: Tensor, shift: int, bits: int) -> Tensor:
    """Numbers of eligible scores by the leading digit of their bit patterns."""
    histogram = torch.zeros(2**bits, dtype=torch.int64, device=score.device)
    for (part,) in chunks(score):
        histogram += _histogram(_bits(part), shift, bits)
    # Above infinity lie what is not a number and all negative ones.
    histogram[(INFINITY_BITS >> shift) + 1 :] = 0
    return histogram


def _at_least(score: Tensor, threshold_bits: int) -> Tensor:
    """Positions of scores that are at least the one of this bit pattern."""
    if threshold_bits > INFINITY_BITS:
        return torch.zeros(0, dtype=torch.int64, device=score.device)
    return positions(score >= torch.tensor(threshold_bits, dtype=torch.int32).view(torch.float32).item())


def _radix_rounds(
    rounds: Sequence[tuple[int, int]],
    keys: list[Tensor],
    candidates: list[Tensor],
    chosen: list[Tensor],
    remaining: list[int],
    sum_over_shards: SumOverShards,
) -> None:
    """Choose what is surely above the threshold; the candidates that are still undecided, if any, are left."""
    for shift, bits in rounds:
        if not any(remaining):
            return
        thresholds = _thresholds([_histogram(key, shift, bits) for key in keys], remaining, sum_over_shards)
        _resolve(keys, candidates, chosen, remaining, thresholds, shift, bits)


def _resolve(
    keys: list[Tensor],
    candidates: list[Tensor],
    chosen: list[Tensor],
    remaining: list[int],
    thresholds: list[tuple[int, int, int]],
    shift: int,
    bits: int,
) -> None:
    """Choose the candidates above the threshold bins, and those inside where all are wanted; keep the undecided."""
    for layer, (bin_index, above, inside) in enumerate(thresholds):
        digit = (keys[layer] >> shift) & (2**bits - 1)
        everything = remaining[layer] == above + inside
        sure = digit >= bin_index if everything else digit > bin_index
        chosen[layer][candidates[layer][sure]] = True
        remaining[layer] -= above + inside if everything else above
        undecided = positions(digit == bin_index) if remaining[layer] else slice(0)
        candidates[layer], keys[layer] = candidates[layer][undecided], keys[layer][undecided]


def _histogram(keys: Tensor, shift: int, bits: int) -> Tensor:
    return torch.bincount((keys >> shift) & (2**bits - 1), minlength=2**bits)


def _thresholds(
    histograms: list[Tensor], remaining: list[int], sum_over_shards: SumOverShards
) -> list[tuple[int, int, int]]:
    """Per layer: the bin that holds the k-th largest key, the number of keys above it, and inside it."""
    # No layer has 2^31 units, so half the bytes do.
    histogram = torch.stack(histograms).to(torch.int32)
    sum_over_shards(histogram)
    from_top = histogram.flip(1).cumsum(1)
    wanted = torch.tensor(remaining, device=histogram.device).unsqueeze(1)
    position = (from_top < wanted).sum(1).clamp(max=histogram.shape[1] - 1)
    bin_index = histogram.shape[1] - 1 - position
    inside = histogram.gather(1, bin_index.unsqueeze(1)).squeeze(1)
    above = from_top.gather(1, position.unsqueeze(1)).squeeze(1) - inside
    rows = zip(bin_index.tolist(), above.tolist(), inside.tolist(), remaining, strict=True)
    # A layer that wants nothing more has its threshold above every bin.
    return [(bin_, up, within) if want else (histogram.shape[1], 0, 0) for bin_, up, within, want in rows]


def _bits(score: Tensor) -> Tensor:
    """Bit pattern of float32 values as int32: in their order where they are not negative. -0.0 counts as 0."""
    return (score + 0.0).view(torch.int32)
