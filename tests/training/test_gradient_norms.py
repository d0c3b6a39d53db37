"""Which gradient norms are out of the ordinary, and what is remembered of them."""

from __future__ import annotations

import json
import math
import random
from statistics import fmean, pstdev

import pytest

from megasparse.training.state import FEWEST_NORMS, RECENT_NORMS, GradientNorms, TrainState


def usual(count: int) -> GradientNorms:
    norms, chance = GradientNorms(), random.Random(0)
    for _ in range(count):
        norms.count(chance.uniform(0.5, 2.0), skipped=False)
    return norms


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("sigma", [None, 6.0])
def test_what_is_not_finite_is_always_skipped(norm: float, sigma: float | None) -> None:
    assert GradientNorms().objection(norm, sigma) == "a loss or gradient is not finite"


@pytest.mark.parametrize("sigma", [0.5, 6.0])
def test_a_norm_is_too_large_from_the_given_deviation_of_the_recent_ones(sigma: float) -> None:
    norms = usual(200)
    assert len(norms.recent) == RECENT_NORMS
    limit = fmean(norms.recent) + sigma * pstdev(norms.recent)
    assert norms.objection(0.999 * limit, sigma) is None and norms.objection(0.0, sigma) is None
    assert "train.skip_step_sigma" in norms.objection(1.001 * limit, sigma)
    assert norms.objection(1e9, None) is None


def test_few_norms_say_nothing() -> None:
    assert usual(FEWEST_NORMS - 1).objection(1e9, 6.0) is None
    assert usual(FEWEST_NORMS).objection(1e9, 6.0) is not None


def test_skipped_steps_are_counted_and_their_norms_forgotten() -> None:
    norms = usual(3)
    recent = norms.recent
    for norm in (1e9, math.nan):
        norms.count(norm, skipped=True)
    assert (norms.recent, norms.skipped, norms.skipped_in_a_row) == (recent, 2, 2)
    norms.count(1.0, skipped=False)
    assert (norms.recent, norms.skipped, norms.skipped_in_a_row) == ([*recent, 1.0], 2, 0)


def test_a_checkpoint_keeps_every_bit_of_them() -> None:
    state = TrainState(step=9, norms=usual(200))
    state.norms.count(math.inf, skipped=True)
    assert TrainState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
