"""The learning rate at the points where each schedule is known."""

from __future__ import annotations

import math

import pytest

from megasparse.config.schema import OptimizerConfig
from megasparse.training.lr_schedule import learning_rate


def settings(**values: object) -> OptimizerConfig:
    return OptimizerConfig(lr=1.0, min_lr_ratio=0.1, warmup_steps=10, **values)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    rates = [learning_rate(step, 110, settings(schedule=schedule)) for step in range(10)]
    assert rates == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert learning_rate(10, 110, settings(schedule=schedule)) == pytest.approx(1.0)


def test_the_decay_has_the_shape_of_its_name() -> None:
    def at(schedule: str, step: int) -> float:
        return learning_rate(step, 110, settings(schedule=schedule))

    assert at("cosine", 60) == pytest.approx(0.55) and at("cosine", 110) == pytest.approx(0.1)
    assert at("cosine", 35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert at("linear", 60) == pytest.approx(0.55) and at("linear", 110) == pytest.approx(0.1)
    # wsd decays over the last fifth: steps 88 to 110.
    assert at("wsd", 87) == 1.0 and at("wsd", 99) == pytest.approx(0.55) and at("wsd", 110) == pytest.approx(0.1)
    assert at("constant", 109) == 1.0


def test_no_schedule_rises_after_the_warm_up() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        rates = [learning_rate(step, 110, settings(schedule=schedule)) for step in range(10, 111)]
        assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
        assert min(rates) >= 0.1 - 1e-12
