"""Arms cost what the budget says, by a count that knows neither the ledger nor the plan."""

from __future__ import annotations

from bisect import bisect_right

import pytest
import torch
from plain_flops import count_flops
from study_files import DENSE, SETTINGS, write

from megasparse.config.loader import ConfigError, check_config
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.studies.format import load_study
from megasparse.studies.solving import solve, with_fields
from megasparse.training.plan import make_plan

VOCABULARY = 257
FLAT_UNTIL = 0.8
"""Share of the run at a constant density below 1, whose attention is `sparse`."""


def counted(config) -> float:
    """FLOPs of all steps, each counted by itself: random growth needs no dense gradient."""
    points, steps, interval = config.sparsity.points, config.train.steps, config.sparsity.update_interval
    models, total = {count: model_of(config, count) for count in layers_by_step(config)}, 0.0
    for step, num_layers in enumerate(layers_by_step(config)):
        model, heads = models[num_layers], [("sparse",) * config.model.num_attention_heads] * num_layers
        densities, patterns = {}, None
        if config.sparsity.algorithm != "dense":
            # A topology update shows from the next step on.
            last_update = max(step - 1, 0) // interval * interval
            densities = dict.fromkeys(model.sparse_layers(), interpolated(points, last_update / steps))
            patterns = heads if step / steps < FLAT_UNTIL else None
        count = count_flops(
            model, config.train.global_batch_size, config.model.seq_length, densities=densities, patterns=patterns
        )
        total += count.total
    return total


def layers_by_step(config) -> list[int]:
    stacking, steps = config.stacking, config.train.steps
    first = round(stacking.until * steps) if stacking.num_layers else 0
    return [stacking.num_layers] * first + [config.model.num_layers] * (steps - first)


def model_of(config, num_layers: int) -> GPT:
    with torch.device("meta"):
        return build_model(with_fields(config, "model", num_layers=num_layers), VOCABULARY, CommunicationGroup(0, 1))


def interpolated(points, progress: float) -> float:
    number = min(bisect_right([u for u, _ in points], progress), len(points) - 1)
    (start, first), (end, last) = points[number - 1], points[number]
    return first + (last - first) * (progress - start) / (end - start)


def test_arms_meet_the_budget_by_an_independent_count(tmp_path) -> None:
    file = write(tmp_path)
    arms, budget = solve(load_study(file), file)
    dense, small, mst = (arm.config for arm in arms)
    assert budget == pytest.approx(0.4 * counted(dense), rel=1e-9)
    assert dense.train.steps == 120 and dense.model.hidden_size == 64
    assert small.model.hidden_size < 64 and small.model.hidden_size % 8 == 0 and 90 < small.train.steps < 160
    assert mst.model.hidden_size == 64 and mst.train.steps != 120
    for arm in arms[1:]:
        assert counted(arm.config) == pytest.approx(budget, rel=0.01)
        assert arm.flops == pytest.approx(budget, rel=0.01)


STACKED = {"model.num_layers": 6, "stacking.num_layers": 2, "stacking.until": 0.45}


def test_arms_that_grow_meet_the_budget_by_an_independent_count(tmp_path) -> None:
    arms = [
        {"name": "dense", "solve": "none", "settings": DENSE},
        {"name": "stacked", "settings": {**DENSE, **STACKED}},
        {"name": "stacked-mst", "settings": STACKED},
    ]
    file = write(tmp_path, budget={"share": 0.9, "of": "dense"}, arms=arms, baselines=[])
    (_, *grown), budget = solve(load_study(file), file)
    for arm in grown:
        assert 50 < arm.config.train.steps and arm.flops == pytest.approx(budget, rel=0.01), arm.name
        # Active blocks are whole, what is counted here is not.
        assert arm.flops == pytest.approx(counted(arm.config), rel=1e-3 if arm.name == "stacked-mst" else 1e-9)
        # The reference is dense training that grows alike.
        dense = counted(check_config({**arm.config.model_dump(mode="json"), "sparsity": {"algorithm": "dense"}}))
        assert arm.plan["flops"]["dense"] == pytest.approx(dense, rel=1e-9), arm.name
        by_step = layers_by_step(arm.config)
        sizes = {count: model_of(arm.config, count) for count in by_step}
        active = [active_parameters(sizes[count], arm.config, step) for step, count in enumerate(by_step)]
        assert arm.mean_active == pytest.approx(sum(active) / len(active), rel=1e-3), arm.name
        assert arm.mean_active < 0.8 * arm.plan["parameters"]["total"]


def active_parameters(model: GPT, config, step: int) -> float:
    """Those that are active in the forward pass of a step, by the schedule."""
    sparse = sum(layer.weight.numel() for layer in model.sparse_layers().values())
    interval = config.sparsity.update_interval
    last_update = max(step - 1, 0) // interval * interval
    density = interpolated(config.sparsity.points, last_update / config.train.steps) if sparse else 1.0
    return model.num_parameters() - (1 - density) * sparse


def test_an_absolute_budget_and_phases_as_shares_of_the_run(tmp_path) -> None:
    file = write(tmp_path, budget={"flops": 3e10}, arms=[{"name": "mst"}], baselines=[])
    (arm,), budget = solve(load_study(file), file)
    assert budget == 3e10 and counted(arm.config) == pytest.approx(3e10, rel=0.01)
    assert arm.config.sparsity.points == [(0.0, 0.25), (0.8, 0.25), (0.9, 1.0), (1.0, 1.0)]
    phases, steps = arm.plan["schedule"]["phases"], arm.config.train.steps
    assert phases[0]["end_step"] == pytest.approx(0.8 * steps, abs=1)
    parameters, density = arm.plan["parameters"], arm.plan["schedule"]["mean_density"]
    active = parameters["total"] - parameters["sparsifiable"] * (1 - density)
    assert arm.mean_active == pytest.approx(active) and density == pytest.approx(
        0.25 * 0.8 + 0.625 * 0.1 + 0.1, abs=0.02
    )


def test_steps_that_leave_no_topology_update_in_the_end_are_passed_over(tmp_path) -> None:
    file = write(tmp_path, budget={"share": 0.3, "of": "dense"})
    arms, budget = solve(load_study(file), file)
    # A correction in proportion comes by 80 steps, whose last update falls before the model is dense.
    with pytest.raises(ConfigError, match="leaves no topology update"):
        make_plan(with_fields(arms[2].config, "train", steps=80), 1)
    assert counted(arms[2].config) == pytest.approx(budget, rel=0.01)


def test_an_arm_that_is_not_solved_costs_what_it_costs(tmp_path) -> None:
    file = write(tmp_path, budget={"flops": 3e10}, arms=[{"name": "mst", "solve": "none"}], baselines=[])
    (arm,), _ = solve(load_study(file), file)
    assert arm.config.train.steps == 120 and arm.flops == make_plan(arm.config, 1)["flops"]["algorithmic"]


@pytest.mark.parametrize(
    ("arm", "flops", "message"),
    [
        ({}, 1e8, r"arm mst: budget: it asks for about 2 train.steps, .* leaves no topology update"),
        ({"settings": DENSE}, 1e9, r"arm mst: budget: 1.00 GFLOPs lies between two numbers of train.steps, 11 cost"),
        (
            {"solve": "width", "settings": {"model.ffn_hidden_size": 128}},
            3e10,
            r"ffn_hidden_size is 128; must",
        ),
        ({"settings": {"train.stepz": 3}}, 3e10, r"arm mst: train.stepz: unknown setting; did you mean steps"),
        ({"settings": {"train.micro_batch_size": 3}}, 3e10, r"arm mst: train.global_batch_size: 4 is not a multiple"),
    ],
)
def test_what_cannot_be_solved_names_arm_and_setting(tmp_path, arm, flops, message) -> None:
    file = write(tmp_path, budget={"flops": flops}, arms=[{"name": "mst", **arm}], baselines=[])
    with pytest.raises(ConfigError, match=message):
        solve(load_study(file), file)


def test_settings_of_an_arm_win_over_those_of_the_study(tmp_path) -> None:
    (tmp_path / "base.yaml").write_text("train: {steps: 7}\nrun: {seed: 5}\noptimizer: {lr: 1e-3}\n")
    settings = {**SETTINGS, "train": {**SETTINGS["train"], "valid_interval": 9}}
    arms = [{"name": "dense", "solve": "none", "settings": {**DENSE, "train": {"valid_interval": 11}}}]
    file = write(tmp_path, base="base.yaml", settings=settings, arms=arms, baselines=[])
    study = load_study(file)
    config = study.config(study.arms[0], file)
    assert (config.train.steps, config.train.valid_interval, config.optimizer.lr) == (120, 11, 1e-3)
    assert study.rates(study.arms[0], config) == [1e-3]
