"""From the arms of a study to runs of equal cost: steps or widths such that algorithmic FLOPs meet the budget.

    arms = solve(study, file)
    arms[0].config.train.steps, arms[0].flops

FLOPs are those of the plan, which walks the schedule through: attention, head and the dense gradients of topology
updates are counted. Phases are shares of a run, so they keep their meaning at any number of steps; what is given in
steps (optimizer.warmup_steps, sparsity.update_interval) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import lcm
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError, check_config
from megasparse.config.schema import RunConfig
from megasparse.studies.format import Study, named
from megasparse.training.plan import make_plan
from megasparse.utils.format import format_flops

TOLERANCE = 0.01
"""Largest difference from the budget, as a share of it."""
ROUNDS = 12
NEAR = 3
"""Steps by which the number of steps may differ from the best one where that is refused."""
MAX_WIDTH = 2**20
WIDTH_UNIT = 8
"""Vector registers and tensor cores like multiples of it; heads are even, as rotary embeddings want."""


@dataclass(frozen=True)
class SolvedArm:
    """An arm as it is trained, but for seed and learning rate."""

    name: str
    solve: str
    config: RunConfig
    rates: list[float]
    """Learning rates to try."""
    plan: dict[str, Any]

    @property
    def flops(self) -> float:
        """Algorithmic, of the whole run."""
        return self.plan["flops"]["algorithmic"]

    @property
    def tokens(self) -> int:
        return self.plan["tokens"]["total"]

    @property
    def mean_active(self) -> float:
        """Active parameters in the mean over the steps, embeddings included."""
        return self.plan["parameters"]["mean_active"]


def solve(study: Study, file: Path, *, without_models: bool = False) -> tuple[list[SolvedArm], float]:
    """The arms in their order, and the budget in FLOPs: the most that one costs where it is given in steps.

    file: that of the study. without_models: leave out `train.init_from` and the teacher, which are still to be made;
    FLOPs do not depend on them. Raises ConfigError naming the arm.
    """
    configs = {arm.name: study.config(arm, file) for arm in study.arms}
    if without_models:
        configs = {name: _without_models(config) for name, config in configs.items()}
    if study.budget.steps is not None:
        return _equal_steps(study, configs, study.budget.steps)
    budget = study.budget.flops
    if budget is None:
        assert study.budget.of is not None and study.budget.share is not None
        with named(study.budget.of):
            budget = study.budget.share * _plan(configs[study.budget.of])["flops"]["algorithmic"]
    solved = []
    for arm in study.arms:
        with named(arm.name):
            config = configs[arm.name]
            if arm.solve == "width":
                config = _solve_width(config, budget)
            if arm.solve != "none":
                config = _solve_steps(config, budget)
            solved.append(SolvedArm(arm.name, arm.solve, config, study.rates(arm, config), _plan(config)))
    return solved, budget


def _equal_steps(study: Study, configs: dict[str, RunConfig], steps: int) -> tuple[list[SolvedArm], float]:
    solved = []
    for arm in study.arms:
        with named(arm.name):
            config = with_fields(configs[arm.name], "train", steps=steps)
            solved.append(SolvedArm(arm.name, "none", config, study.rates(arm, config), _plan(config)))
    return solved, max(arm.flops for arm in solved)


def _without_models(config: RunConfig) -> RunConfig:
    return with_fields(with_fields(config, "train", init_from=None), "distillation", teacher=None)


def _solve_steps(config: RunConfig, budget: float) -> RunConfig:
    """Costs are nearly proportional to steps, so a few corrections in proportion arrive."""

    @cache
    def flops(steps: int) -> float:
        return _plan(with_fields(config, "train", steps=steps))["flops"]["algorithmic"]

    tried, steps = list[int](), config.train.steps
    while steps not in tried and len(tried) < ROUNDS:
        tried.append(steps)
        steps = _possible(max(round(steps * budget / flops(steps)), 1), flops)
    steps = min(tried, key=lambda steps: abs(flops(steps) - budget))
    if abs(flops(steps) - budget) > TOLERANCE * budget:
        raise ConfigError(
            f"budget: {format_flops(budget)} lies between two numbers of train.steps, {steps} cost "
            f"{format_flops(flops(steps))}; must be that of at least {round(0.5 / TOLERANCE)} steps, or train.steps "
            "nearer to what it allows"
        )
    return with_fields(config, "train", steps=steps)


def _possible(steps: int, flops: Callable[[int], float]) -> int:
    """The nearest number of steps with which the arm can be trained: some leave no topology update after the
    restoration. Raises ConfigError where none is near."""
    refusal = None
    for number in sorted(range(max(steps - NEAR, 1), steps + NEAR + 1), key=lambda number: abs(number - steps)):
        try:
            flops(number)
            return number
        except ConfigError as error:
            refusal = refusal or error
    raise ConfigError(f"budget: it asks for about {steps} train.steps, with which the arm cannot be trained: {refusal}")


def _solve_width(config: RunConfig, budget: float) -> RunConfig:
    """The width whose cost is nearest to the budget at the given steps; heads and blocks divide it."""
    model, sparsity = config.model, config.sparsity
    if model.ffn_hidden_size is not None:
        raise ConfigError(
            f"solve: width needs an MLP that grows with it, but model.ffn_hidden_size is {model.ffn_hidden_size}; must "
            "be unset, or solve steps"
        )
    of_heads = 1 if model.attention_head_dim else model.num_attention_heads
    unit = lcm(2 * of_heads, WIDTH_UNIT, _block_size(sparsity))

    @cache
    def flops(number: int) -> float:
        return _plan(with_fields(config, "model", hidden_size=number * unit))["flops"]["algorithmic"]

    nearest = _nearest(flops, budget, MAX_WIDTH // unit)
    return with_fields(config, "model", hidden_size=nearest * unit)


def _nearest(flops: Callable[[int], float], budget: float, largest: int) -> int:
    """The number from 1 to `largest` with the cost nearest to the budget; costs rise with it."""
    above = 1
    while flops(above) < budget and above < largest:
        above = min(2 * above, largest)
    below = max(above // 2, 1)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if flops(middle) < budget else (below, middle)
    return min(below, above, key=lambda number: abs(flops(number) - budget))


def _block_size(sparsity: Any) -> int:
    if sparsity.algorithm == "dense":
        return 1
    return lcm(sparsity.block_size, *(group.block_size or 1 for group in sparsity.groups))


def _plan(config: RunConfig) -> dict[str, Any]:
    return make_plan(config, world_size=1)


def with_fields(config: RunConfig, section: str, **fields: Any) -> RunConfig:
    """The configuration with other values in one section, checked anew."""
    values = config.model_dump(mode="json")
    values[section] |= fields
    return check_config(values)
