"""One topology in every layout: data-parallel x tensor-parallel ranks, simulated by threads, decide what one rank does.

Scores tie often here. The pieces of state are cut at any point, empty ones included.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shards import SimulatedMesh, SimulatedRanks, cuts, on_mesh

from megasparse.parallel import CommunicationGroup, ShardSpec
from megasparse.sparsity.evolution import StepCounts
from megasparse.sparsity.state import StateFragment
from megasparse.sparsity.statistics import collect_statistics
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits
from megasparse.sparsity.update import EvolvingLayer, update_layers

# Rows and columns in weights, divided dimension, fused parts: all divide by 4 ranks and units of 1 and 2.
SHAPES = {
    "column": ((16, 8), 0, ()),
    "row": ((8, 24), 1, ()),
    "fused": ((32, 8), 0, (16, 8, 8)),
}
SEED, STEP = 11, 5


class Pieces:
    """A rank's piece of each whole matrix [4, rows, columns]: weight, gradient and two moments."""

    def __init__(self, whole: dict[str, torch.Tensor], topologies, mesh: SimulatedMesh | None, points) -> None:
        self.shard = mesh.data_parallel if mesh else CommunicationGroup()
        self.tensor_parallel = mesh.tensor_parallel if mesh else CommunicationGroup()
        self.whole = mesh.whole if mesh else CommunicationGroup()
        self.found, self.told = {}, set()
        for name, tensors in whole.items():
            partition, rank = weight_partition(name, self.tensor_parallel.size), self.tensor_parallel.rank
            flat = torch.stack([partition.shard(tensor, rank).reshape(-1) for tensor in tensors])
            start, stop = cuts(flat.shape[1], points[: self.shard.size - 1])[self.shard.rank]
            if stop > start:
                weight, gradient, first, second = flat[:, start:stop].clone()
                self.found[name] = StateFragment(start, weight, gradient, {"exp_avg": first, "exp_avg_sq": second})

    def fragments(self) -> dict[str, StateFragment]:
        return self.found

    def gradients_changed(self, names) -> None:
        self.told |= set(names)


def weight_partition(name: str, size: int) -> ShardSpec:
    shape, dim, parts = SHAPES[name]
    return ShardSpec(shape, dim, size, parts)


def whole_state(block_size: int, density: float, levels: int, seed: int) -> tuple[dict, dict]:
    """Masks on the unit grid, and state with few different values, so that scores tie."""
    generator = torch.Generator().manual_seed(seed)
    masks, state = {}, {}
    for name, (shape, _, _) in SHAPES.items():
        grid = tuple(n // block_size for n in shape)
        masks[name] = torch.rand(grid, generator=generator) < density
        values = torch.randint(-levels, levels + 1, (4, *shape), generator=generator).float()
        active = torch.kron(masks[name], torch.ones(block_size, block_size, dtype=torch.bool))
        values[[0, 2, 3]] *= active
        state[name] = values
    return masks, state


def decide(masks, state, block_size: int, counts, mesh: SimulatedMesh | None, points: Sequence[int], keep=False):
    """One topology update; masks of the whole layers as packed bits, this rank's shards of the state, statistics."""
    ranks: SimulatedRanks | CommunicationGroup = mesh.tensor_parallel if mesh else CommunicationGroup()
    topologies = {}
    for name, mask in masks.items():
        grid = weight_partition(name, ranks.size).blocks(block_size)
        topologies[name] = Topology(name, grid.shard(mask, ranks.rank).clone(), block_size, grid, ranks.rank)
    layers = [
        EvolvingLayer(topologies[name], counts(name, ranks.size), stream, "magnitude_gradient", 0.5, False, keep)
        for stream, name in enumerate(masks)
    ]
    pieces = Pieces(state, topologies, mesh, points)
    changes = update_layers(layers, pieces, SEED, STEP)
    assert pieces.told == set(masks)
    ever = {name: pack_bits(topology.mask) for name, topology in topologies.items()}
    statistics = collect_statistics(topologies, changes, ever, ranks)
    whole = {name: ranks.sum_(pack_bits(t.spread(t.mask))) for name, t in topologies.items()}
    return whole, {name: (f.start, f.master, f.gradient) for name, f in pieces.found.items()}, statistics


def even_counts(masks, active_share: float):
    """Keep half of the active units and grow to `active_share` of all, half by gradient."""

    def counts(name: str, num_shards: int) -> tuple[StepCounts, ...]:
        active, total = int(masks[name].sum()), masks[name].numel()
        target = max(int(active_share * total), 1)
        keep = min(active // 2, target)
        grow = target - keep
        return (StepCounts(active, keep, grow // 2, grow - grow // 2),)

    return counts


@given(
    data=st.data(),
    layout=st.sampled_from([(1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (1, 4), (8, 1), (3, 2), (5, 1)]),
    block_size=st.sampled_from([1, 2]),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 10**6),
    keep=st.booleans(),
)
def test_every_layout_takes_the_decision_of_one_rank(data, layout, block_size, levels, seed, keep) -> None:
    masks, state = whole_state(block_size, data.draw(st.floats(0.1, 1.0)), levels, seed)
    counts = even_counts(masks, data.draw(st.floats(0.05, 0.9)))
    points = data.draw(st.lists(st.integers(0, 256), min_size=layout[0] - 1, max_size=layout[0] - 1))
    expected, whole_pieces, numbers = decide(masks, state, block_size, counts, None, [], keep)
    results = on_mesh(*layout, lambda mesh: decide(masks, state, block_size, counts, mesh, points, keep))
    for found, _, statistics in results:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], bits) for name, bits in expected.items())
        for name, layer in statistics.items():
            alone = numbers[name]
            assert (layer.inactive_rows, layer.grown, layer.dropped, layer.ever_active) == (
                alone.inactive_rows, alone.grown, alone.dropped, alone.ever_active,
            )  # fmt: skip
            assert sum(layer.shard_active) == sum(alone.shard_active) and len(layer.shard_active) == layout[1]
    for name in masks:
        for index in (1, 2):
            assert torch.equal(
                put_together(name, layout, results, index), whole_pieces[name][index].view(SHAPES[name][0])
            )


def put_together(name: str, layout: tuple[int, int], results, index: int) -> torch.Tensor:
    """A tensor of the whole matrix from the pieces of all ranks."""
    partition = weight_partition(name, layout[1])
    shards = []
    for shard in range(layout[1]):
        of_shard = [results[replica * layout[1] + shard][1] for replica in range(layout[0])]
        pieces = [piece[name][index] for piece in of_shard if name in piece]
        shards.append(torch.cat(pieces).view(partition.local_shape))
    return partition.merge(shards)


@pytest.mark.parametrize("block_size", [1, 2])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_balanced_shards_hold_equal_numbers_whatever_the_replicas(block_size, num_replicas) -> None:
    masks, state = whole_state(block_size, 1.0, 1000, 4)

    def counts(name: str, num_shards: int) -> tuple[StepCounts, ...]:
        units = masks[name].numel() // num_shards
        return tuple(StepCounts(units, units // 8, units // 8, units // 8) for _ in range(num_shards))

    alone = on_mesh(1, 4, lambda mesh: decide(masks, state, block_size, counts, mesh, []))
    results = on_mesh(num_replicas, 4, lambda mesh: decide(masks, state, block_size, counts, mesh, [30]))
    for found, _, statistics in results:
        for name, mask in masks.items():
            share = mask.numel() // 4
            assert statistics[name].shard_active == (3 * (share // 8),) * 4
            assert torch.equal(found[name], alone[0][0][name])


def test_a_change_in_one_score_is_seen() -> None:
    """The comparison above can fail: another gradient gives another topology."""
    masks, state = whole_state(1, 0.5, 1000, 1)
    counts = even_counts(masks, 0.5)
    before, _, _ = decide(masks, state, 1, counts, None, [])
    inactive = (~unpack_bits(before["row"], masks["row"].numel()).view_as(masks["row"]) & ~masks["row"]).nonzero()[0]
    state["row"][1, inactive[0], inactive[1]] = 10**6
    after, _, _ = decide(masks, state, 1, counts, None, [])
    assert torch.equal(before["column"], after["column"]) and not torch.equal(before["row"], after["row"])
    assert unpack_bits(after["row"], masks["row"].numel()).view_as(masks["row"])[inactive[0], inactive[1]]
