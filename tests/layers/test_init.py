"""Initial weights depend on seed and name only."""

from __future__ import annotations

import torch

from megasparse.layers.init import normal_, parameter_seed


def test_seed_is_stable_over_versions() -> None:
    # Fixed for ever: a changed value would change the initial weights of every run.
    assert parameter_seed(1234, "head.weight") == 0x19B7DDFFC5BF487
    assert 0 <= parameter_seed(0, "x") < 2**63


def test_names_and_seeds_give_different_weights() -> None:
    drawn = [normal_(torch.empty(8, 8), 1.0, seed, name) for seed in (0, 1) for name in ("a.weight", "b.weight")]
    for i, first in enumerate(drawn):
        for second in drawn[i + 1 :]:
            assert not torch.equal(first, second)


def test_standard_deviation_and_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    drawn = normal_(torch.empty(300, 300), 0.02, 7, "w")
    assert torch.equal(torch.get_rng_state(), state)
    # 90,000 draws: the deviation of the estimate is 0.02 / sqrt(180,000) = 5e-5.
    assert abs(drawn.std().item() - 0.02) < 3e-4 and abs(drawn.mean().item()) < 4e-4


def test_numbers_do_not_depend_on_the_dtype() -> None:
    single = normal_(torch.empty(33, 5), 0.5, 3, "w")
    half = normal_(torch.empty(33, 5, dtype=torch.bfloat16), 0.5, 3, "w")
    assert torch.equal(single.bfloat16(), half)


def test_meta_tensors_are_left_alone() -> None:
    assert normal_(torch.empty(4, 4, device="meta"), 1.0, 0, "w").is_meta
