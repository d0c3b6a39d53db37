"""Initial weights depend on seed and name only."""

from __future__ import annotations

import random

import pytest
import torch

from megasparse.layers.init import divided_parameter, parameter_seed
from megasparse.layers.skip_ahead import DEGREE, _power, _product, _remainder, generator_at
from megasparse.parallel import ShardSpec, shard_spec_of


def drawn(shape: tuple[int, ...], std: float, seed: int, name: str) -> torch.Tensor:
    return divided_parameter(ShardSpec(shape), 0, std=std, seed=seed, name=name).detach()


def test_seed_is_stable_over_versions() -> None:
    # Fixed for ever: a changed value would change the initial weights of every run.
    assert parameter_seed(1234, "head.weight") == 0x19B7DDFFC5BF487
    assert 0 <= parameter_seed(0, "x") < 2**63


def test_names_and_seeds_give_different_weights() -> None:
    several = [drawn((8, 8), 1.0, seed, name) for seed in (0, 1) for name in ("a.weight", "b.weight")]
    for i, first in enumerate(several):
        for second in several[i + 1 :]:
            assert not torch.equal(first, second)


def test_standard_deviation_and_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    weights = drawn((300, 300), 0.02, 7, "w")
    assert torch.equal(torch.get_rng_state(), state)
    # 90,000 draws: the deviation of the estimate is 0.02 / sqrt(180,000) = 5e-5.
    assert abs(weights.std().item() - 0.02) < 3e-4 and abs(weights.mean().item()) < 4e-4


def test_the_numbers_are_those_of_a_plain_draw() -> None:
    """Fixed too: ``normal_`` on a float32 tensor with a generator of this seed."""
    generator = torch.Generator().manual_seed(parameter_seed(3, "w"))
    assert torch.equal(drawn((33, 5), 0.5, 3, "w"), torch.empty(33, 5).normal_(0, 0.5, generator=generator))


def test_shards_are_cut_from_the_same_draw() -> None:
    whole = drawn((12, 4), 0.5, 3, "w")
    for partition in (ShardSpec((12, 4), 0, 2), ShardSpec((12, 4), 1, 4), ShardSpec((12, 4), 0, 2, (8, 2, 2))):
        shards = [divided_parameter(partition, r, std=0.5, seed=3, name="w") for r in range(partition.size)]
        assert torch.equal(partition.merge([shard.detach() for shard in shards]), whole)
        assert all(shard_spec_of(shard) == partition and shard.tensor_model_parallel for shard in shards)


def test_meta_tensors_stay_meta() -> None:
    with torch.device("meta"):
        assert divided_parameter(ShardSpec((4, 4)), 0, std=1.0, seed=0, name="w").is_meta


def drawn_part(shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Entries of a parameter of which the others were not asked for."""
    return divided_parameter(ShardSpec(shape), 0, std=0.5, seed=3, name="w", deferred=True).initial(start, stop - start)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (33, 5), (64, 48), (1, 17), (15, 1)])
def test_any_part_has_the_values_of_the_whole(shape: tuple[int, ...]) -> None:
    """Numbers of entries that blocks of 16 divide, and others: the last ones are then drawn apart."""
    whole, chance = drawn(shape, 0.5, 3, "w").view(-1), random.Random(str(shape))
    bounds = [sorted(chance.choices(range(len(whole) + 1), k=2)) for _ in range(60)]
    for start, stop in [(0, 0), (0, len(whole)), (len(whole) - 1, len(whole)), *bounds]:
        assert torch.equal(drawn_part(shape, start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize(
    "partition", [ShardSpec((36, 8), 0, 2), ShardSpec((36, 8), 0, 3, (24, 6, 6)), ShardSpec((2500, 12), 1, 4)]
)
def test_any_part_of_a_shard_has_the_values_of_the_whole(partition: ShardSpec) -> None:
    whole, chance = drawn(partition.shape, 0.5, 3, "w"), random.Random(partition.size)
    for rank in range(partition.size):
        shard = partition.shard(whole, rank).reshape(-1)
        parameter = divided_parameter(partition, rank, std=0.5, seed=3, name="w", deferred=True)
        assert parameter.count_nonzero() == 0 and shard_spec_of(parameter) == partition
        for _ in range(20):
            start, stop = sorted(chance.choices(range(len(shard) + 1), k=2))
            assert torch.equal(parameter.initial(start, stop - start), shard[start:stop]), (rank, start, stop)


@pytest.mark.parametrize("position", [1, 2, 226, 227, 623, 624, 625, 19937, 100_003])
def test_a_jump_leads_to_where_draws_lead(position: int) -> None:
    after = torch.Generator().manual_seed(77)
    torch.rand(position, generator=after)
    jumped = generator_at(77, position, discarded_at_most=0)
    assert torch.equal(torch.rand(2000, generator=jumped), torch.rand(2000, generator=after))
    assert generator_at(77, position, 0).initial_seed() == 77


def test_jumps_add_up() -> None:
    """Too far to draw: t^(a + b) is t^a t^b."""
    whole = _power(10**12 + 7)
    assert whole == _remainder(_product(_power(10**12), _power(7))) and whole.bit_length() <= DEGREE


def test_a_part_of_a_large_matrix_is_that_of_a_whole_draw() -> None:
    """Beyond what is drawn and thrown away, so that the generator jumps."""
    shape, rows = (1100, 2048), ShardSpec((1100, 2048), 0, 2)
    whole = drawn(shape, 0.02, 3, "w")
    shard = divided_parameter(rows, 1, std=0.02, seed=3, name="w").detach()
    assert torch.equal(shard, whole[550:])
