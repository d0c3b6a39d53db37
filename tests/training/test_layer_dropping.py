"""Layer dropping: how often branches are kept, that expectations stay, and what a dropped branch leaves behind."""

from __future__ import annotations

from math import exp, sqrt

import pytest
import torch

from megasparse.config.checks import check_run, unused_settings
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.layers import scaled_branch
from megasparse.methods.callback import Step
from megasparse.methods.layer_dropping import branch_scales, keep_probabilities
from megasparse.methods.registry import build_methods
from megasparse.models import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.training.plan import make_plan

# From the first step on theta is 0.3, but for 1e-9.
AT_ONCE = ["layer_dropping.theta=0.3", "layer_dropping.gamma=20"]
SMALL = [
    "model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=16",
    "model.vocab_size=64", "train.steps=24", "train.precision=fp32", "train.global_batch_size=8",
    "sparsity.block_size=8", "sparsity.update_interval=3",
]  # fmt: skip
DENSE = ["sparsity.algorithm=dense"]
LAYERS, STEPS = 100, 520


def run_config(words: list[str]) -> RunConfig:
    return load_config([], [*SMALL, *words])


def test_theta_falls_as_in_the_paper() -> None:
    config = run_config(["layer_dropping.theta=0.5", "train.steps=1000"])
    thetas = [config.layer_dropping.theta_at(t, 1000) for t in range(1000)]
    assert thetas == pytest.approx([0.5 * exp(-0.1 * t) + 0.5 for t in range(1000)])
    assert config.layer_dropping.mean_theta(1000) == pytest.approx(sum(thetas) / 1000)
    # Its example: 12 layers at theta 0.5 keep 1 - (1 - theta)(L + 1) / (2 L) of them.
    assert sum(keep_probabilities(0.5, 12)) / 12 == pytest.approx(0.7292, abs=1e-4)


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """Scales [steps, layers, branch], 1.04e5 of them, all at theta 0.3."""
    config = run_config([*AT_ONCE, f"train.steps={STEPS + 2}"])
    return torch.tensor([branch_scales(config, t, LAYERS) for t in range(2, STEPS + 2)], dtype=torch.float64)


def test_branches_are_kept_as_often_as_they_should(draws) -> None:
    p = torch.tensor([1 - number / LAYERS * 0.7 for number in range(1, LAYERS + 1)], dtype=torch.float64)[:, None]
    spread = (p * (1 - p) / STEPS).sqrt()
    kept = draws > 0
    assert ((kept.double().mean(0) - p).abs() < 4.5 * spread).all()
    assert torch.equal(draws[kept], (1 / p).expand(LAYERS, 2).expand_as(draws)[kept])
    # The two branches of a block, neighbouring blocks and steps know nothing of each other.
    z = (kept.double() - p) / (p * (1 - p)).sqrt()
    pairs = (z[..., 0] * z[..., 1], z[:, 1:] * z[:, :-1], z[1:] * z[:-1])
    assert all(abs(pair.mean()) * sqrt(pair.numel()) < 4.5 for pair in pairs)


def test_the_expected_output_of_a_linear_block_is_that_of_all_layers(draws) -> None:
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    full, added, pooled = x + x @ weight, (x @ weight).norm(), torch.zeros(2, 3, 8, dtype=torch.float64)
    for number in range(LAYERS):
        scales, counts = draws[:, number].flatten().unique(return_counts=True)
        outputs = [x + scaled_branch(lambda x: x @ weight, float(scale), x) for scale in scales]
        mean = sum(output * count for output, count in zip(outputs, counts, strict=True)) / counts.sum()
        p = 1 - (number + 1) / LAYERS * 0.7
        assert (mean - full).norm() < 4.5 * sqrt((1 - p) / p / (2 * STEPS)) * added, f"block {number}"
        pooled += mean / LAYERS
    # Of all draws the spread is below 1 / sqrt(1e5); scales of the block before would be off by 0.04 in the mean.
    assert (pooled - full).norm() < 4.5 * sqrt(1 / draws.numel()) * added


def test_attention_and_mlp_can_be_dropped_together() -> None:
    config = run_config([*AT_ONCE, "layer_dropping.together=true"])
    scales = [pair for t in range(2, 20) for pair in branch_scales(config, t, 6)]
    assert all(attention == mlp for attention, mlp in scales) and 0.0 in {mlp for _, mlp in scales}
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 5})})
    assert scales != [pair for t in range(2, 20) for pair in branch_scales(other, t, 6)]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_model_with_dropped_branches_is_the_model_without_them(recompute: bool) -> None:
    words = [*DENSE, f"train.activation_recomputation={str(recompute).lower()}"]
    model = build_model(run_config(words), 64).double()
    tokens = torch.randint(0, 64, (2, 16))
    scales = [(0.0, 1.25), (2.0, 0.0)]
    model.set_branch_scales(scales)
    found = model(tokens)
    x = model.embedding(tokens)
    x = x + 1.25 * model.layers[0].mlp(normalized(model.layers[0], x))
    x = x + 2.0 * model.layers[1].attention(model.layers[1].attention_norm(x))
    expected = model.logits(model.final_norm(x))
    assert torch.equal(found, expected)
    direction = torch.randn_like(found)
    parameters = dict(model.named_parameters())
    wanted = torch.autograd.grad(expected, list(parameters.values()), direction, allow_unused=True)
    found.backward(direction)
    for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
        # A dropped branch has gradients, and they are exactly zero.
        dropped = name.startswith(("layers.0.attention", "layers.1.mlp"))
        assert dropped == (gradient is None) == (not parameter.grad.any())
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    # Whoever looks at the model sees all of it.
    model.eval()
    assert torch.equal(model(tokens), build_all(model, tokens))


def normalized(block, x: torch.Tensor) -> torch.Tensor:
    return block.mlp_norm(x, torch.zeros_like(x))[1]


def build_all(model, tokens: torch.Tensor) -> torch.Tensor:
    x = model.embedding(tokens)
    for block in model.layers:
        x = x + block.attention(block.attention_norm(x))
        x = x + block.mlp(normalized(block, x))
    return model.logits(model.final_norm(x))


def test_a_topology_update_by_gradient_has_all_layers_and_the_ledger_counts_those_kept() -> None:
    config = run_config([*AT_ONCE, "sparsity.algorithm=rigl"])
    with torch.device("meta"):
        model = build_model(config, 64)
    methods = build_methods(config, model, CommunicationGroup())
    methods[-1].attach(None, None)
    seen, updates = set(), []
    for index in range(1, 24):
        step = Step(index)
        for method in (methods[0], methods[-1]):
            # Without a mesh the controller only decides.
            method.begin_step(step)
        scales = [block.branch_scales for block in model.layers]
        methods[-1].after_step(step)
        assert {block.branch_scales for block in model.layers} == {(1.0, 1.0)}
        if step.work.dense_gradient_layers:
            assert set(scales) == {(1.0, 1.0)}
            assert set(step.work.computed.values()) == {1.0} == {step.metrics["kept_branches"]}
            updates.append(index)
            continue
        assert scales == branch_scales(config, index, 2)
        for number, of_block in enumerate(scales):
            names = ("attention", "attention.qkv", "attention.output"), ("mlp.up", "mlp.down")
            for branch, scale in zip(names, of_block, strict=True):
                shares = {step.work.computed[f"layers.{number}.{name}"] for name in branch}
                assert shares == {float(scale > 0)}
                seen |= shares
        assert "head" not in step.work.computed
    assert seen == {0.0, 1.0} and updates[:2] == [3, 6]


def test_a_plan_counts_what_may_be_expected() -> None:
    words = [*DENSE, "train.steps=4000", "model.num_layers=4", "attention.phases={}"]
    whole = make_plan(run_config(words), 1)["flops"]["algorithmic"]
    plan = make_plan(run_config([*words, "layer_dropping.theta=0.4"]), 1)
    head = 6 * 4000 * 8 * 16 * 32 * 64
    theta = sum(0.6 * exp(-0.025 * t) + 0.4 for t in range(4000)) / 4000
    expected = 1 - (1 - theta) * 5 / 8
    assert (plan["flops"]["algorithmic"] - head) / (whole - head) == pytest.approx(expected, rel=1e-4)
    assert plan["methods"][0].startswith(f"layers are dropped, attention and MLP each for itself: {expected:.1%}")


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="train.compile: blocks does not go with layer_dropping"):
        check_run(run_config([*AT_ONCE, "train.compile=blocks"]), 1)
    assert unused_settings(run_config(["layer_dropping.gamma=2"]))[-1].endswith("only: layer_dropping.gamma")
