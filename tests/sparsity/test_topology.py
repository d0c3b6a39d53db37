"""Masks on the unit grid: bits, slices of the flat weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasparse.parallel import ShardSpec
from megasparse.sparsity.topology import Topology, pack_bits, unpack_bits


def make(rows: int, columns: int, block_size: int, seed: int = 0, name: str = "layer") -> Topology:
    return Topology(name, torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5, block_size)


@given(st.lists(st.booleans(), max_size=100))
def test_bits_go_round(values) -> None:
    mask = torch.tensor(values, dtype=torch.bool)
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-len(values) // 8)
    assert torch.equal(unpack_bits(bits, len(values)), mask)


def test_bits_lie_low_first_in_row_major_order() -> None:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 0] = True
    assert pack_bits(mask).tolist() == [2, 1]


@pytest.mark.parametrize("num_units", [0, 8, 17])
def test_bits_of_another_length_are_refused(num_units) -> None:
    with pytest.raises(ValueError, match=f"2 bytes of mask bits do not hold {num_units} units"):
        unpack_bits(torch.zeros(2, dtype=torch.uint8), num_units)


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(3, 4, 1), (3, 2, 2), (2, 3, 3), (1, 1, 4)])
def test_every_slice_equals_the_plain_expansion(rows, columns, block_size) -> None:
    topology = make(rows, columns, block_size, seed=rows)
    plain = torch.kron(topology.mask, torch.ones(block_size, block_size, dtype=torch.bool)).reshape(-1)
    other = torch.rand(rows * columns) < 0.5
    plain_other = torch.kron(other.view(rows, columns), torch.ones(block_size, block_size, dtype=torch.bool)).reshape(
        -1
    )
    for start in range(topology.numel + 1):
        for stop in range(start, topology.numel + 1):
            assert torch.equal(topology.weights_slice(start, stop - start), plain[start:stop])
            assert torch.equal(topology.weights_slice(start, stop - start, other), plain_other[start:stop])


def test_counts_and_replacement_in_place() -> None:
    mask = torch.tensor([[True, False], [False, False], [True, True]])
    topology = Topology("layer", mask, 4)
    assert (topology.num_units, topology.shard_units, topology.shard_width, topology.numel) == (6, 6, 8, 96)
    topology.replace(torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.bool))
    assert mask.tolist() == [[True, True], [True, True], [True, False]]


@pytest.mark.parametrize(("dim", "parts"), [(0, ()), (1, ()), (0, (4, 2, 2))])
def test_a_shard_knows_its_places_in_the_whole(dim, parts) -> None:
    grid = ShardSpec((8, 6), dim, 2, parts)
    whole = torch.rand(8, 6) < 0.5
    numbers = torch.arange(48).view(8, 6)
    joined = torch.zeros(48, dtype=torch.uint8)
    for rank in (0, 1):
        topology = Topology("layer", grid.shard(whole, rank).clone(), 2, grid, rank)
        assert (topology.num_units, topology.numel, topology.num_shards) == (48, 192, 2)
        own = topology.unit_numbers(0, topology.shard_units)
        assert torch.equal(own, grid.shard(numbers, rank).reshape(-1))
        assert torch.equal(topology.unit_numbers(5, 9), own[5:14])
        assert torch.equal(topology.pick(whole.reshape(-1)), topology.mask.reshape(-1))
        assert torch.equal(topology.pick(numbers, 1 - rank), grid.shard(numbers, 1 - rank).reshape(-1))
        joined += topology.spread(topology.mask).to(torch.uint8)
    assert torch.equal(joined.bool().view(8, 6), whole)
