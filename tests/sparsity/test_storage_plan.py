"""The plan of packed storage: every topology update that a run can make finds room, in few changes, none of which
costs more than it saves."""

from __future__ import annotations

import random

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.models.build import build_model
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.storage import MAX_CHANGES, plan_storage

MODEL = [
    "model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=4", "model.vocab_size=64",
    "model.seq_length=16", "sparsity.block_size=8", "sparsity.storage=packed", "train.global_batch_size=8",
]  # fmt: skip
SCHEDULES = {
    "mst": [],
    "mst, low": ["sparsity.density=0.02"],
    "linear": ["sparsity.warmup_shape=linear", "sparsity.restoration_shape=cubic"],
    "steps": ["sparsity.warmup_shape=steps", "sparsity.restoration_shape=steps"],
    "born sparse": ["sparsity.warmup_end=0"],
    "rigl": ["sparsity.algorithm=rigl"],
    "gradual": ["sparsity.algorithm=gradual"],
    "spdf": ["sparsity.algorithm=spdf"],
    "erdos-renyi": ["sparsity.distribution=erdos_renyi", "sparsity.depth_boost=0.7"],
    "groups": ["sparsity.groups=[{pattern: '*.mlp.*', density: 0.4, block_size: 4}]"],
    "high": ["sparsity.density=0.7"],
    "full": ["sparsity.density=1.0"],
}


CLOSEST = "sparsity.capacity_change_cost=0"


def random_points(seed: int) -> list[str]:
    chance = random.Random(seed)
    at = sorted({0.0, *(round(chance.random() * 0.9, 3) for _ in range(chance.randint(1, 30)))})
    return [f"sparsity.points={[[x, round(chance.uniform(0.03, 1.0), 3)] for x in at]}"]


def controller_of(config) -> Controller:
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size)
    return Controller(config, model.sparse_layers())


CASES = [*SCHEDULES.values(), *map(random_points, range(12))]


@pytest.mark.parametrize("steps,interval,cost", [(400, 10, 0), (399, 7, 10), (57, 50, 10)])
@pytest.mark.parametrize("words", CASES, ids=[*SCHEDULES, *(f"points {n}" for n in range(12))])
def test_every_update_finds_room_also_a_late_one(words, steps, interval, cost) -> None:
    # A run that would end sparse, or too few updates, is refused elsewhere.
    if "density=1.0" not in "".join(words) and interval == 50:
        words = [*words, "sparsity.algorithm=gradual"] if not any("algorithm" in word for word in words) else words
    config = load_config(
        [],
        [*MODEL, *words, f"train.steps={steps}", f"sparsity.update_interval={interval}"]
        + [f"sparsity.capacity_change_cost={cost}"],
    )
    try:
        controller = controller_of(config)
    except ValueError:
        pytest.skip("refused")
    plan = plan_storage(config, controller)
    assert len(plan.changes) - 1 <= MAX_CHANGES and plan.changes[0][0] == 0
    assert [first for first, _ in plan.changes] == sorted({first for first, _ in plan.changes})
    units = {name: topology.num_units for name, topology in controller.topologies.items()}

    def fits(step: int, progress: float) -> None:
        room = plan.capacities(plan.at(step))
        controller.shard_active = {
            name: (max(1, min(units[name], int(density * units[name] + 0.5))),)
            for name, density in controller.densities_at(progress).items()
        }
        for name, (active,) in controller.shard_active.items():
            assert active <= room.get(name, units[name]), (step, name)

    last = 0
    for step in range(steps):
        # As the last update left it, and as one in this step, due or late, would leave it.
        fits(step, last / steps)
        fits(step, step / steps)
        last = step if step % interval == 0 else last


def cost_of(changes, plan, steps: int, change_cost: float) -> float:
    ends = [*(first for first, _ in changes[1:]), steps]
    room = sum((end - first) * plan.rungs[rung] for (first, rung), end in zip(changes, ends, strict=True))
    return room + change_cost * (len(changes) - 1)


@pytest.mark.parametrize("words", CASES, ids=[*SCHEDULES, *(f"points {n}" for n in range(12))])
def test_no_change_can_be_left_out_or_added_at_less_cost(words) -> None:
    """Against plans of the same rungs by brute force: any run of stretches held at any higher rung, and the plan that
    follows the schedule as closely as it can."""
    steps, words = 400, [*MODEL, *words, "train.steps=400", "sparsity.update_interval=10"]
    config, closest = load_config([], words), load_config([], [*words, CLOSEST])
    controller = controller_of(config)
    plan, close = plan_storage(config, controller), plan_storage(closest, controller)
    cost = cost_of(plan.changes, plan, steps, 10.0)
    assert cost <= cost_of(close.changes, close, steps, 10.0) + 1e-9 and len(plan.changes) <= len(close.changes)
    starts = [first for first, _ in plan.changes]
    for begin in range(len(starts)):
        for end in range(begin + 1, len(starts) + 1):
            for rung in range(min(rung for _, rung in plan.changes[begin:end]) + 1):
                held = [*plan.changes[:begin], (starts[begin], rung), *plan.changes[end:]]
                merged = [one for one, last in zip(held, [(0, None), *held], strict=False) if one[1] != last[1]]
                assert cost <= cost_of(merged, plan, steps, 10.0) + 1e-9


def test_short_stretches_are_passed_over() -> None:
    words = [*MODEL, "train.steps=600", "sparsity.update_interval=10", "sparsity.warmup_end=0.15"]
    words += ["sparsity.restoration_start=0.6", "sparsity.restoration_end=0.75"]
    config, costly = load_config([], words), load_config([], [*words, "sparsity.capacity_change_cost=1000"])
    controller = controller_of(config)
    changes = plan_storage(config, controller).changes
    assert 2 <= len(changes) - 1 <= 4
    assert all(later - first >= 10 for (first, _), (later, _) in zip(changes, changes[1:], strict=False))
    assert plan_storage(costly, controller).changes == ((0, 0),)


def test_the_lowest_density_has_no_slack_and_full_layers_are_matrices() -> None:
    config = load_config([], [*MODEL, "train.steps=400", "sparsity.update_interval=10", CLOSEST])
    controller = controller_of(config)
    plan = plan_storage(config, controller)
    assert plan.rungs[0] == 1.0 and plan.rungs[-1] == 0.1 and plan.capacities(0) == {}
    for name, room in plan.capacities(len(plan.rungs) - 1).items():
        assert room == int(0.1 * controller.topologies[name].num_units + 0.5)
    assert plan.changes[0] == (0, 0) and plan.changes[-1][1] == 0, "it begins and ends dense"
    assert {rung for _, rung in plan.changes} == set(range(len(plan.rungs)))
    assert list(plan.stretches(400))[-1][1] == 400


def test_a_run_that_stands_elsewhere_gets_what_it_needs() -> None:
    config = load_config([], [*MODEL, "train.steps=400", "sparsity.update_interval=10", CLOSEST])
    controller = controller_of(config)
    plan = plan_storage(config, controller)
    step = 200
    lowest = plan.at(step)
    planned = {name: (room,) for name, room in plan.capacities(lowest).items()}
    assert plan.fitting(step, planned) == lowest
    name = next(iter(planned))
    assert plan.fitting(step, {**planned, name: (planned[name][0] + 1,)}) == lowest - 1
    assert plan.fitting(step, {**planned, name: (controller.topologies[name].num_units,)}) == 0
    sparse = load_config(
        [], [*MODEL, "train.steps=400", "sparsity.algorithm=rigl", "sparsity.update_interval=10", CLOSEST]
    )
    plan = plan_storage(sparse, controller_of(sparse))
    with pytest.raises(ValueError, match=r"sparsity.storage: packed, but layer .* active blocks.*; must be dense"):
        plan.fitting(step, {**planned, name: (planned[name][0] + 1,)})
