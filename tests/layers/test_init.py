"""Initial weights depend on seed and name only."""

from __future__ import annotations

import torch

from megasparse.layers.init import divided_parameter, parameter_seed
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
