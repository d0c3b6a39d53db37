"""MaskedAdamW against torch's AdamW and, with per-weight steps, against scalar arithmetic; groups that hold each
parameter once."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.engine.optimizer import (
    MAX_WEIGHT_STEPS,
    MaskedAdamW,
    Multipliers,
    ParameterGroup,
    parameter_groups,
    set_learning_rates,
)
from megasparse.methods.mixed_sparsity import MixedSparsityTraining
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup

SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=2", "model.seq_length=16",
    "model.vocab_size=64", "sparsity.block_size=8", "optimizer.lr=0.01", "optimizer.weight_decay=0.2",
]  # fmt: skip


def build(*overrides: str) -> tuple[GPT, MixedSparsityTraining]:
    config = load_config([], [*SMALL, *overrides])
    model = build_model(config, 64)
    method = MixedSparsityTraining(config, model, CommunicationGroup())
    method.start(lambda weight: nullcontext())
    return model, method


def make_optimizer(tensors, *overrides: str, masked: bool = False) -> MaskedAdamW:
    config = load_config([], [*SMALL, *overrides])
    groups = [{"name": "all", "params": tensors, "weight_decay": 0.2, "masked": masked, "rules": {}}]
    return MaskedAdamW(groups, config.optimizer, config.sparsity)


def parameters(*shapes, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_without_ages_it_is_adamw() -> None:
    ours, theirs = parameters((7, 5), (11,)), parameters((7, 5), (11,))
    optimizer = make_optimizer(ours, masked=True)
    reference = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.2, foreach=False)
    for step in range(30):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # 30 float32 steps of size 0.01, fused and not; a few units in the last place of weights of size 1 to 4.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("overrides", [[], ["sparsity.per_weight_step_counts=true"]])
def test_skipped_updates_change_nothing(overrides) -> None:
    (weight,) = parameters((4, 4))
    optimizer = make_optimizer([weight], *overrides, masked=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone(), {k: v.clone() for k, v in optimizer.state[weight].items()}
    optimizer.skip_updates = True
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in before[1].items())
    optimizer.skip_updates = False
    optimizer.step()
    assert not torch.equal(weight, before[0])


class ScalarAdamW:
    """One weight with its age, in Python floats."""

    def __init__(self, weight: float, by_age: bool, ramp: int) -> None:
        self.weight, self.by_age, self.ramp = weight, by_age, ramp
        self.first = self.second = 0.0
        self.weight_steps = self.steps = 0

    def step(self, gradient: float, lr: float = 0.01, decay: float = 0.2) -> None:
        self.weight_steps, self.steps = self.weight_steps + 1, self.steps + 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.95 * self.second + 0.05 * gradient**2
        count = self.weight_steps if self.by_age else self.steps
        update = self.first / (1 - 0.9**count) / (math.sqrt(self.second / (1 - 0.95**count)) + 1e-8)
        if self.ramp and self.weight_steps < self.steps:
            update *= min(1.0, self.weight_steps / self.ramp)
        self.weight = self.weight * (1 - lr * decay) - lr * update

    def be_grown(self) -> None:
        self.weight = self.first = self.second = 0.0
        self.weight_steps = 0


@pytest.mark.parametrize(("by_age", "ramp"), [(True, 0), (False, 5), (True, 5)])
def test_ages_against_scalar_arithmetic(by_age, ramp) -> None:
    (weight,) = parameters((6,))
    scalars = [ScalarAdamW(float(value), by_age, ramp) for value in weight.detach()]
    overrides = [f"sparsity.per_weight_step_counts={str(by_age).lower()}", f"sparsity.regrowth_warmup_steps={ramp}"]
    optimizer = make_optimizer([weight], *overrides, masked=True)
    births = {4: [1], 9: [1, 2], 10: [3], 17: [5]}
    for step in range(25):
        for index in births.get(step, []):
            scalars[index].be_grown()
            with torch.no_grad():
                weight[index] = 0
            for key in ("exp_avg", "exp_avg_sq", "weight_steps"):
                optimizer.state[weight][key][index] = 0
        weight.grad = torch.randn(6, generator=torch.Generator().manual_seed(step))
        for scalar, gradient in zip(scalars, weight.grad.tolist(), strict=True):
            scalar.step(gradient)
        optimizer.step()
        expected = torch.tensor([scalar.weight for scalar in scalars])
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-6)
    assert (
        optimizer.state[weight]["weight_steps"].tolist()
        == [scalar.weight_steps for scalar in scalars]
        == [25, 16, 16, 15, 25, 8]
    )


def test_the_first_update_of_a_new_weight() -> None:
    """By age it is one full step of the learning rate; by the global step count (1 - b1) / sqrt(1 - b2) of one."""
    for by_age, expected in [(True, 1.0), (False, 0.1 / math.sqrt(0.05))]:
        (weight,) = parameters((2,))
        optimizer = make_optimizer([weight], f"sparsity.per_weight_step_counts={str(by_age).lower()}", masked=True)
        weight.grad = torch.ones(2)
        for _ in range(200):
            optimizer.step()
        state = optimizer.state[weight]
        for tensor in (
            weight.data,
            state["exp_avg"],
            state["exp_avg_sq"],
            *([state["weight_steps"]] if by_age else []),
        ):
            tensor[0] = 0
        optimizer.step()
        assert -float(weight.detach()[0]) / 0.01 == pytest.approx(expected, rel=1e-3)


def test_inactive_weights_stay_exactly_zero() -> None:
    (weight,) = parameters((50,))
    optimizer = make_optimizer(
        [weight], "sparsity.per_weight_step_counts=true", "sparsity.regrowth_warmup_steps=3", masked=True
    )
    weight.data[::2] = 0
    for step in range(5):
        weight.grad = torch.randn(50, generator=torch.Generator().manual_seed(step))
        weight.grad[::2] = 0
        optimizer.step()
        state = optimizer.state[weight]
        assert not weight[::2].any() and not state["exp_avg"][::2].any() and not state["exp_avg_sq"][::2].any()
        assert weight[1::2].all()


def test_ages_stop_at_their_largest_value() -> None:
    (weight,) = parameters((2,))
    optimizer = make_optimizer([weight], "sparsity.regrowth_warmup_steps=4", masked=True)
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[weight]["weight_steps"].fill_(MAX_WEIGHT_STEPS - 1)
    optimizer.state[weight]["step"].fill_(MAX_WEIGHT_STEPS - 1)
    for _ in range(3):
        optimizer.step()
        assert optimizer.state[weight]["weight_steps"].tolist() == [MAX_WEIGHT_STEPS] * 2
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    "overrides",
    [
        [], ["sparsity.head=true"], ["sparsity.head=true", "model.tie_embeddings=false"], ["sparsity.low_rank=4"],
        ["sparsity.algorithm=dense"], ["sparsity.distribution=erdos_renyi", "sparsity.depth_boost=0.5"],
        ["sparsity.groups=[{pattern: 'layers.0.*', dense: true}]"], ["model.normalization=rmsnorm", "model.bias=false"],
    ],
)  # fmt: skip
def test_groups_hold_every_parameter_once(overrides) -> None:
    model, method = build(*overrides)
    groups = parameter_groups(model, [method], method.config.optimizer.weight_decay)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    sparse = {id(layer.weight) for layer in model.sparse_layers().values()}
    for group in groups:
        if not group["masked"]:
            assert not sparse & {id(p) for p in group["params"]}
        else:
            assert {id(p) for p in group["params"]} <= sparse
        vectors = {p.ndim < 2 for p in group["params"]}
        assert vectors == {group["name"] == "vectors"}
        assert group["weight_decay"] == (0.0 if group["name"] == "vectors" else 0.2)
    assert len({group["name"] for group in groups}) == len(groups)


def test_learning_rates_follow_the_density() -> None:
    model, method = build("sparsity.algorithm=set", "sparsity.density=0.25", "sparsity.lr_density_power=0.5")
    config, controller = method.config, method.controller
    optimizer = MaskedAdamW(parameter_groups(model, [method], 0.2), config.optimizer, config.sparsity)
    rates = set_learning_rates(optimizer, 1e-3, [method], 0.2)
    for group in optimizer.param_groups:
        multiplier = 2.0 if group["masked"] else 1.0
        assert group["lr"] == rates[group["name"]] == pytest.approx(1e-3 * multiplier)
        if group["name"] != "vectors":
            assert group["weight_decay"] == pytest.approx(0.2 / multiplier)
    for name, topology in controller.topologies.items():
        controller.expect_active(name, topology.num_units)
    set_learning_rates(optimizer, 1e-3, [method], 0.2)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}


def test_a_parameter_of_two_rules_has_the_product_of_their_multipliers() -> None:
    model, method = build("sparsity.algorithm=set", "sparsity.density=0.25", "sparsity.lr_density_power=0.5")

    class Slow:
        """The second block and its norms at half the learning rate."""

        def groups(self):
            return [(ParameterGroup("slow"), list(model.layers[1].parameters()))]

        def multipliers(self, group: str) -> Multipliers:
            return Multipliers(lr=0.5)

    rules = [method, Slow()]
    groups = parameter_groups(model, rules, 0.2)
    second = {id(parameter) for parameter in model.layers[1].parameters()}
    optimizer = MaskedAdamW(groups, method.config.optimizer, method.config.sparsity)
    rates = set_learning_rates(optimizer, 1e-3, rules, 0.2)
    for group in optimizer.param_groups:
        slow, sparse = group["name"].rpartition("+")[2].startswith("slow"), group["name"].startswith("sparse")
        assert all((id(parameter) in second) is slow for parameter in group["params"])
        assert rates[group["name"]] == pytest.approx(1e-3 * (0.5 if slow else 1.0) * (2.0 if sparse else 1.0))
        vectors = all(parameter.ndim < 2 for parameter in group["params"])
        assert group["weight_decay"] == pytest.approx(0.0 if vectors else 0.1 if sparse else 0.2)
    assert {group["name"] for group in groups} > {"slow.vectors", "matrices", "vectors"}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
