"""Balanced clusters of the neurons of an MLP, and how alike two clusterings are: plain functions of tensors.

    labels = cluster_neurons(rows, clusters=16, previous=labels, seed=7)

Neurons are rows of the first weight, compared by direction (Zhang et al. 2024, arXiv 2410.03440, whose code has rounds
of an auction where here is a stable matching: neurons ask the clusters that they like best, and full ones keep those
nearest to them; it ends, is unique, and needs no step size).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROUNDS = 20


def cluster_neurons(rows: Tensor, clusters: int, previous: Tensor | None, seed: int) -> Tensor:
    """int64 labels [F] of neurons by rows [F, C], float32, all clusters equally large. Begins at random neurons, and
    also at the clusters of `previous`; those of the smaller distances win."""
    directions = F.normalize(rows, dim=1)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(rows), generator=generator)[:clusters].to(rows.device)
    starts = [directions[picked]]
    if previous is not None:
        starts.insert(0, centroids(rows, previous, clusters))
    found = [_improve(directions, start) for start in starts]
    # The one that stays wins where both are as good.
    return max(found, key=lambda pair: pair[1])[0]


def centroids(rows: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Mean direction of each cluster, length 1: [clusters, C]. They serve as rows of the router: a common length, such
    as that of the weights, would not change which of their products with a token are largest."""
    directions = F.normalize(rows, dim=1)
    sums = directions.new_zeros(clusters, rows.shape[1]).index_add_(0, labels, directions)
    return F.normalize(sums, dim=1)


def _improve(directions: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    """The best labels on the way, and the sum of their cosines."""
    best, best_sum = None, -float("inf")
    for _ in range(ROUNDS):
        labels = balanced_assignment(directions @ centers.t())
        centers = centroids(directions, labels, len(centers))
        total = float((directions * centers[labels]).sum(dtype=torch.float64))
        if total <= best_sum:
            break
        best, best_sum = labels, total
    assert best is not None
    return best, best_sum


def balanced_assignment(scores: Tensor) -> Tensor:
    """int64 labels [F] by scores [F, E]: each cluster has F / E neurons, and no neuron and cluster would rather have
    each other than what they have (Gale and Shapley, 1962)."""
    neurons, clusters = scores.shape
    assert neurons % clusters == 0
    open_scores = scores.double().clone()
    while True:
        labels = open_scores.argmax(1)
        wanted = torch.full_like(open_scores, -float("inf"))
        wanted.scatter_(1, labels[:, None], open_scores.gather(1, labels[:, None]))
        # Neurons that did not ask stand last, and those that a full cluster turns away do not ask it again.
        ranks = wanted.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
        refused = ranks.gather(1, labels[:, None]).squeeze(1) >= neurons // clusters
        if not refused.any():
            return labels
        open_scores[refused, labels[refused]] = -float("inf")


def adjusted_rand_index(left: Tensor, right: Tensor) -> float:
    """Of two int64 labels [F]: 1 where the clusters are the same, 0 in the mean where they have nothing to do with each
    other (Hubert and Arabie, 1985, equation 5)."""
    table = torch.zeros(int(left.max()) + 1, int(right.max()) + 1, dtype=torch.float64)
    table.index_put_((left.cpu(), right.cpu()), torch.ones(len(left), dtype=torch.float64), accumulate=True)

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / pairs(torch.tensor([float(len(left))])) if len(left) > 1 else 0.0
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)
