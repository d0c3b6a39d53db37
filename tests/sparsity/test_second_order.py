"""Second-order costs and what makes up for dropped weights, against the formulas of the paper written down plainly."""

from __future__ import annotations

import pytest
import torch
from shards import on_shards
from torch import Tensor

from megasparse.config.checks import check_run, storage_obstacle, unused_settings
from megasparse.config.loader import ConfigError, load_config
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.second_order import BlockFisher
from megasparse.sparsity.topology import Topology

DAMPING = 0.05
CASES = [(1, 8, 24), (1, 8, 20), (2, 8, 20), (4, 8, 20), (8, 4, 24), (4, 4, 12)]
"""Block size, side of Fisher blocks, columns; of 20 columns the last Fisher block is cut."""


def problem(block_size: int, columns: int, seed: int = 0) -> tuple[Topology, Tensor, list[Tensor]]:
    """A matrix of 8 rows, a quarter of it inactive, and five gradients."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(8 // block_size, columns // block_size, generator=generator) < 0.75
    mask[0, 0] = True
    topology = Topology("layer", mask, block_size)
    active = topology.weights_slice(0, topology.numel)
    weights = torch.randn(topology.numel, generator=generator) * active
    # Neighbours have something in common, or no weight could make up for another. Inactive ones have gradients, too.
    common = torch.randn(5, topology.numel // 4, generator=generator).repeat_interleave(4, dim=1)
    gradients = 1e-4 * (common + torch.randn(5, topology.numel, generator=generator))
    return topology, weights, list(gradients)


def plain_inverses(topology: Topology, side: int, gradients: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight numbers and F^-1 over the active weights of each Fisher block, by the recursion of the paper."""
    active, width, found = topology.weights_slice(0, topology.numel), topology.shard_width, []
    for row in range(topology.numel // width):
        for first in range(0, width, side):
            numbers = row * width + torch.arange(first, min(first + side, width))
            numbers = numbers[active[numbers]]
            if not len(numbers):
                continue
            own = [gradient[numbers].double() for gradient in gradients]
            damping = DAMPING * sum((g * g).mean() for g in own) / len(own)
            inverse = torch.eye(len(numbers), dtype=torch.float64) / damping
            for g in own:
                product = inverse @ g
                inverse = inverse - torch.outer(product, product) / (len(own) + g @ product)
            found.append((numbers, inverse))
    return found


def fisher_of(topology: Topology, side: int, gradients: list[Tensor], ranks=None) -> BlockFisher:
    fisher = BlockFisher(topology, side, DAMPING, ranks or CommunicationGroup())
    for gradient in gradients:
        fisher.add(gradient)
    return fisher


def unit_sums(values: Tensor, topology: Topology) -> Tensor:
    side, rows = topology.block_size, topology.mask.shape[0]
    return values.view(rows, side, -1, side).sum(dim=(1, 3))


@pytest.mark.parametrize(("block_size", "side", "columns"), CASES)
def test_costs_are_those_of_the_paper(block_size: int, side: int, columns: int) -> None:
    topology, weights, gradients = problem(block_size, columns)
    scores = fisher_of(topology, side, gradients).scores(weights)
    expected = torch.zeros(topology.numel, dtype=torch.float64)
    for numbers, inverse in plain_inverses(topology, side, gradients):
        # Units that a Fisher block holds a part of, one after the other.
        unit = numbers // columns // block_size * columns + numbers % columns // block_size
        for chosen in (unit == value for value in unit.unique()):
            own = weights[numbers[chosen]].double()
            expected[numbers[chosen][0]] += own @ torch.linalg.solve(inverse[chosen][:, chosen], own) / 2
    # Sums of five float32 products, 2^-22, through matrices of a condition of up to a few hundred.
    torch.testing.assert_close(
        unit_sums(scores.double().square(), topology), unit_sums(expected, topology), rtol=2e-4, atol=0
    )


@pytest.mark.parametrize(("block_size", "side", "columns"), CASES)
def test_other_weights_make_up_for_those_dropped(block_size: int, side: int, columns: int) -> None:
    topology, weights, gradients = problem(block_size, columns)
    fisher, inverses = fisher_of(topology, side, gradients), plain_inverses(topology, side, gradients)
    fisher.scores(weights)
    left = torch.rand(topology.mask.shape, generator=torch.Generator().manual_seed(9)) < 0.6
    topology.replace(topology.mask & left)
    stays = topology.weights_slice(0, topology.numel)
    change, expected = fisher.compensation(), torch.zeros(topology.numel, dtype=torch.float64)
    for numbers, inverse in inverses:
        gone = ~stays[numbers]
        own = weights[numbers[gone]].double()
        step = -inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], own)
        torch.testing.assert_close(step[gone], -own)
        expected[numbers] = step.masked_fill(gone, 0.0)
    torch.testing.assert_close(change.double(), expected, rtol=2e-4, atol=2e-5)
    assert not change[~stays].any() and (block_size >= side or change.abs().max() > 0.1)


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
def test_ranks_share_the_blocks_and_find_the_same(num_ranks: int) -> None:
    def work(rank: int, ranks) -> tuple[Tensor, ...]:
        topology, weights, gradients = problem(2, 20)
        fisher = fisher_of(topology, 8, gradients, ranks)
        packed, scores = fisher.packed(), fisher.scores(weights)
        topology.mask[1:3] = False
        return packed, scores, fisher.compensation()

    alone = work(0, CommunicationGroup())
    for found in on_shards(num_ranks, work):
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def test_sums_go_on_from_a_checkpoint_bit_for_bit() -> None:
    topology, weights, gradients = problem(1, 20)
    straight, before = fisher_of(topology, 8, gradients), fisher_of(topology, 8, gradients[:3])
    after = BlockFisher(topology, 8, DAMPING, CommunicationGroup())
    after.unpack(before.packed(), 3)
    for gradient in gradients[3:]:
        after.add(gradient)
    assert torch.equal(straight.scores(weights), after.scores(weights))
    with pytest.raises(ValueError, match="second_order.fisher_block 4 makes it"):
        BlockFisher(topology, 4, DAMPING, CommunicationGroup()).unpack(before.packed(), 3)


def test_weights_without_gradients_cost_nothing() -> None:
    topology, weights, gradients = problem(1, 24)
    for gradient in gradients:
        gradient[:8] = 0.0
    scores = fisher_of(topology, 8, gradients).scores(weights)
    active = topology.weights_slice(0, topology.numel)
    assert scores.isfinite().all() and scores[:8].max() < scores[8:][active[8:]].min()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tensor_parallel_size=2"], "parallel.tensor_parallel_size: 2 does not go with"),
        (["sparsity.drop_fraction=0.1"], "sparsity.drop_fraction: 0.1 does not go with"),
        (["sparsity.groups=[{pattern: '*.mlp.*', drop_score: snip}]"], "groups.0.drop_score: snip does not go with"),
        (["sparsity.groups=[{pattern: '*.mlp.*', algorithm: set}]"], "groups.0.algorithm: set does not go with"),
        (["second_order.fisher_block=48"], "second_order.fisher_block: 48 neither divides the block size 64"),
        (["sparsity.storage=packed"], "sparsity.algorithm: obert does not go with sparsity.storage packed"),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_run(load_config([], ["model.vocab_size=64", "sparsity.algorithm=obert", *words]), 2)


def test_what_is_not_used_is_said() -> None:
    config = load_config([], ["sparsity.algorithm=obert", "sparsity.drop_score=snip"])
    assert any("obert: sparsity.drop_score" in line for line in unused_settings(config))
    assert storage_obstacle(config) is not None
    words = ["sparsity.algorithm=gradual", "second_order.gradients=4"]
    assert any("obert only: second_order.gradients" in line for line in unused_settings(load_config([], words)))
