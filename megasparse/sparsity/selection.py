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

INELIGIBLE = -1.0
"""Score of a unit that may not be chosen."""

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
    candidates = [(score >= 0).nonzero().squeeze(1) for score in scores]
    digits_of_score = [_bits(score.index_select(0, where)) for score, where in zip(scores, candidates, strict=True)]
    remaining, undecided = _radix_rounds(digits_of_score, candidates, chosen, list(counts), sum_over_shards)
    # Every rank sees the same sums, so all of them enter the rounds for ties or none does.
    if any(remaining):
        digits_of_key = [keys(where) for keys, where in zip(tie_keys, undecided, strict=True)]
        remaining, _ = _radix_rounds(digits_of_key, undecided, chosen, remaining, sum_over_shards)
    assert not any(remaining), "more units asked for than eligible, or tie keys that repeat"
    return chosen


def _radix_rounds(
    keys: list[Tensor],
    candidates: list[Tensor],
    chosen: list[Tensor],
    remaining: list[int],
    sum_over_shards: SumOverShards,
) -> tuple[list[int], list[Tensor]]:
    """Choose what is surely above the threshold; return how many are still to choose among the undecided."""
    remaining = list(remaining)
    for shift, bits in ROUNDS:
        if not any(remaining):
            break
        digits = [torch.bincount((key >> shift) & (2**bits - 1), minlength=2**bits) for key in keys]
        # No layer has 2^31 units, so half the bytes do.
        histogram = torch.stack(digits).to(torch.int32)
        sum_over_shards(histogram)
        for layer, (bin_index, above, inside) in enumerate(_threshold_bins(histogram, remaining)):
            digit = (keys[layer] >> shift) & (2**bits - 1)
            chosen[layer][candidates[layer][digit > bin_index]] = True
            remaining[layer] -= above
            at_threshold = digit == bin_index
            if remaining[layer] == inside:
                chosen[layer][candidates[layer][at_threshold]] = True
                remaining[layer] = 0
            keep = at_threshold if remaining[layer] else torch.zeros_like(at_threshold)
            candidates[layer], keys[layer] = candidates[layer][keep], keys[layer][keep]
    return remaining, candidates


def _threshold_bins(histogram: Tensor, remaining: list[int]) -> list[tuple[int, int, int]]:
    """Per layer: the bin that holds the k-th largest key, the number of keys above it, and inside it."""
    from_top = histogram.flip(1).cumsum(1)
    wanted = torch.tensor(remaining, device=histogram.device).unsqueeze(1)
    position = (from_top < wanted).sum(1).clamp(max=histogram.shape[1] - 1)
    bin_index = histogram.shape[1] - 1 - position
    inside = histogram.gather(1, bin_index.unsqueeze(1)).squeeze(1)
    above = from_top.gather(1, position.unsqueeze(1)).squeeze(1) - inside
    rows = zip(bin_index.tolist(), above.tolist(), inside.tolist(), remaining, strict=True)
    # A layer that wants nothing more has its threshold above every bin.
    return [(bin_, up, within) if want else (histogram.shape[1], 0, -1) for bin_, up, within, want in rows]


def _bits(score: Tensor) -> Tensor:
    """Bit pattern of non-negative float32 values as int64; -0.0 counts as 0."""
    return (score.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)
