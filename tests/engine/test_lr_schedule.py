"""The learning rate at the points where each schedule is known."""

from __future__ import annotations

import math

import pytest

from megasparse.config.loader import load_config
from megasparse.config.schema import OptimizerConfig
from megasparse.engine.lr_schedule import decay_start, learning_rate


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


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.55), ("linear", 0.55), ("wsd", 0.55), ("constant", 1.0)])
def test_the_decay_waits_until_the_model_is_dense(schedule: str, middle: float) -> None:
    rates = [learning_rate(step, 110, settings(schedule=schedule, decay_fraction=0.5), 70) for step in range(111)]
    assert rates[9:71] == [1.0] * 62
    assert rates[71] < 1.0 or schedule == "constant"
    assert rates[90] == pytest.approx(middle) and rates[110] == pytest.approx(2 * middle - 1)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        # Dense by the schedule from step 85 on, by the topology at the update after it.
        ([], 90),
        (["sparsity.update_interval=17"], 85),
        (["sparsity.points=[[0,0.2],[0.3,1],[0.4,1],[0.5,0.5],[0.72,1]]"], 80),
        (["sparsity.algorithm=spdf"], 70),
        (["sparsity.algorithm=dense"], None),
        (["optimizer.decay_start=schedule"], None),
    ],
)
def test_the_step_in_which_a_run_becomes_dense(overrides: list[str], start: int | None) -> None:
    base = ["train.steps=100", "sparsity.update_interval=10", "optimizer.decay_start=dense"]
    assert decay_start(load_config([], [*base, *overrides])) == start
