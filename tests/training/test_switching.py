"""Switching: clusters are balanced and found again, mixtures compute what they should, and phases follow the rule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.layers.clustered_mlp import ClusteredMLP
from megasparse.methods.neuron_clusters import adjusted_rand_index, balanced_assignment, centroids, cluster_neurons
from megasparse.methods.switching import PhaseController
from megasparse.models import build_model
from megasparse.training.plan import make_plan

SMALL = [
    "model.num_layers=1", "model.hidden_size=16", "model.num_attention_heads=4", "model.seq_length=16",
    "model.vocab_size=64", "model.activation=relu2", "train.steps=100", "train.precision=fp32",
    "train.global_batch_size=8", "sparsity.algorithm=dense", "switching.clusters=8", "switching.active=2",
]  # fmt: skip


def run_config(words: list[str]) -> RunConfig:
    return load_config([], [*SMALL, *words])


def test_planted_clusters_are_found_and_balanced() -> None:
    centers = F.normalize(torch.randn(6, 32), dim=1)
    planted = torch.arange(6).repeat(10)[torch.randperm(60)]
    rows = (centers[planted] + 0.02 * torch.randn(60, 32)) * (0.5 + torch.rand(60, 1))
    found = max((cluster_neurons(rows, 6, None, seed) for seed in range(12)), key=lambda x: cosines(rows, x, 6))
    assert adjusted_rand_index(found, planted) == 1.0
    # From clusters that are good already no random start leads away.
    again = cluster_neurons(rows, 6, planted, 3)
    assert torch.equal(again, planted)
    noise = torch.randn(60, 32)
    first, second = cluster_neurons(noise, 6, None, 1), cluster_neurons(torch.randn(60, 32), 6, None, 1)
    assert first.bincount(minlength=6).tolist() == [10] * 6
    assert abs(adjusted_rand_index(first, second)) < 0.25
    assert cosines(noise, cluster_neurons(noise, 6, first, 2), 6) >= cosines(noise, first, 6) - 1e-4


def cosines(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> float:
    return float((F.normalize(rows, dim=1) * centroids(rows, labels, clusters)[labels]).sum())


def test_an_assignment_is_stable() -> None:
    scores = torch.randn(40, 5)
    labels = balanced_assignment(scores)
    assert labels.bincount(minlength=5).tolist() == [8] * 5
    for neuron in range(40):
        for cluster in range(5):
            prefers = scores[neuron, cluster] > scores[neuron, labels[neuron]]
            assert not (prefers and scores[neuron, cluster] > scores[labels == cluster, cluster].min())


def test_the_rand_index_is_that_of_pairs() -> None:
    left, right = torch.randint(0, 4, (30,)), torch.randint(0, 3, (30,))
    one, other = torch.randint(0, 4, (30,)), torch.tensor([2, 0, 3, 1])
    assert adjusted_rand_index(one, other[one]) == 1.0
    same = [[bool(x[i] == x[j]) for i in range(30) for j in range(i)] for x in (left, right)]
    total, a, b = len(same[0]), sum(same[0]), sum(same[1])
    both = sum(x and y for x, y in zip(*same, strict=True))
    expected = (both - a * b / total) / ((a + b) / 2 - a * b / total)
    assert adjusted_rand_index(left, right) == pytest.approx(expected)


@pytest.mark.parametrize(("active", "shards", "bias"), [(2, 1, True), (4, 2, False), (8, 1, True), (8, 2, True)])
def test_a_mixture_is_the_dense_mlp_with_the_other_neurons_masked(active: int, shards: int, bias: bool) -> None:
    mlp = build_model(run_config([f"model.bias={str(bias).lower()}"]), 64).layers[0].mlp.double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    router, x = torch.randn(8, 16), torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    scores = (x.detach().float() @ router.t()).view(2, 7, shards, 8 // shards)
    kept = scores >= scores.sort(-1, descending=True).values[..., active // shards - 1, None]
    mask = kept.flatten(2).repeat_interleave(8, -1)
    z = F.linear(x, mlp.up.weight, mlp.up.bias)
    expected = F.linear(z.relu().square() * mask, mlp.down.weight, mlp.down.bias)
    dense = mlp(x)
    mlp.in_training = ClusteredMLP(router, active, shards)
    found = mlp(x)
    torch.testing.assert_close(found, expected)
    if active == 8:
        torch.testing.assert_close(found, dense)
    direction = torch.randn_like(found)
    inputs = [x, *mlp.parameters()]
    wanted = torch.autograd.grad(expected, inputs, direction)
    for gradient, other in zip(torch.autograd.grad(found, inputs, direction), wanted, strict=True):
        torch.testing.assert_close(gradient, other)
    mlp.eval()
    assert torch.equal(mlp(x), dense)


def test_routers_of_clusters_keep_more_of_the_activations_than_random_ones() -> None:
    """Neurons that look in the same direction fire together: a quarter of the clusters, chosen by the router, has more
    of the activations of a token than the best quarter of a random division of the neurons."""
    centers = F.normalize(torch.randn(8, 64), dim=1)
    rows = centers.repeat_interleave(12, 0) + 0.08 * torch.randn(96, 64)
    x = centers[torch.randint(0, 8, (500,))] + 0.1 * torch.randn(500, 64)
    mass = (x @ rows.t()).relu().square()

    def share(labels: torch.Tensor, by_router: bool) -> float:
        of_cluster = torch.zeros(500, 8).index_add_(1, labels, mass)
        scores = x @ centroids(rows, labels, 8).t() if by_router else of_cluster
        return float((of_cluster.gather(1, scores.topk(2).indices).sum(1) / mass.sum(1)).mean())

    random = torch.arange(8).repeat(12)[torch.randperm(96)]
    assert share(cluster_neurons(rows, 8, None, 0), True) > share(random, False) + 0.1


def controller(words: list[str]) -> PhaseController:
    return PhaseController(run_config(words))


def phases(rule: PhaseController, similarity) -> list[bool]:
    found = []
    for number in range(1, 101):
        found.append(rule.is_sparse)
        if rule.is_due(number):
            rule.decide(number, similarity(number))
    return found


def test_phases_follow_the_drift_of_the_clusters() -> None:
    assert not any(phases(controller([]), lambda number: 0.89))
    words = ["switching.interval=2", "switching.period=10"]
    found = phases(controller(words), lambda number: 0.95 if number >= 20 else 0.3)
    assert not any(found[:20]) and all(found[20:30])
    assert not any(found[30:32]), "dense until clustered again"
    assert not any(found[90:]) and 0.4 < sum(found[:90]) / 90 < 0.6
    # The rule goes on from its numbers.
    one, other = controller(words), controller(words)
    phases(one, lambda number: 1.0)
    other.load(one.numbers())
    assert vars(one) == vars(other)


def test_a_plan_counts_the_products_that_are_left_out() -> None:
    words = ["switching.interval=10", "switching.period=20", "attention.phases={}"]
    config = run_config(words)
    plan = make_plan(config, 1)
    # Clustered at 10 and 20; then 20 steps of 100 until half of the steps so far were sparse.
    rule, seen = controller(words), []
    sparse = sum(phases(rule, lambda number: float(bool(seen) or seen.append(number) is not None)))
    mlp = 3 * 2 * 8 * 16 * 2 * 16 * 64
    flops = plan["flops"]
    assert flops["dense"] - flops["algorithmic"] == pytest.approx(0.75 * mlp * sparse)
    assert sparse > 20 and plan["methods"][0].startswith("MLPs pass each token through 2 of 8 clusters")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.activation=gelu", "model.activation: gelu does not go with switching.clusters; must be relu2"),
        ("switching.clusters=7", "switching.clusters: 7 .* divides the width of the MLP, 64"),
        ("switching.active=9", "switching.active: 9 .* at most switching.clusters, 8"),
        ("switching.shards=4", "switching.active: 2 .* a multiple of switching.shards, 4"),
        ("sparsity.algorithm=mst", "sparsity.algorithm: mst .* must be dense"),
        ("activation_sparsity.pattern='2:4'", "activation_sparsity.pattern: 2:4 .* must be none"),
        ("train.compile=blocks", "train.compile: blocks .* must be none"),
    ],
)
def test_what_does_not_go_with_it_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(run_config([word]), 1)


def test_settings_without_clusters_are_named() -> None:
    config = load_config([], ["switching.active=2"])
    assert unused_settings(config)[-1].endswith("only: switching.active")
