"""Normalisation after the residual sum, and Admin: the equations, what goes with them, and what is gained in depth."""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import layer_norm

from megasparse.config.checks import check_run
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.huggingface.settings_out import choose_architecture
from megasparse.layers import ResidualWeight
from megasparse.methods.admin import Admin
from megasparse.methods.callback import Step
from megasparse.models import build_model
from megasparse.models.gpt import GPT

POST = "model.normalization_position=post"
ADMIN = [POST, "model.residual_weight=admin"]
SMALL = [
    "model.num_layers=3", "model.hidden_size=32", "model.num_attention_heads=4", "model.seq_length=16",
    "model.vocab_size=64", "train.steps=24", "train.precision=fp32", "sparsity.block_size=8",
]  # fmt: skip


def run_config(words: list[str]) -> RunConfig:
    return load_config([], [*SMALL, *words])


def tokens(samples: int = 4) -> torch.Tensor:
    return torch.randint(0, 64, (samples, 16))


def plain(model: GPT, tokens_BT: torch.Tensor, omegas: list[torch.Tensor], variances: list[float]) -> torch.Tensor:
    """Hidden states by the equations; the variance of each branch over the first sample is added to `variances`."""
    x = model.embedding(tokens_BT, None, first=0)
    numbers = iter(omegas)
    for block in model.layers:
        for branch, norm in ((block.attention, block.attention_norm), (block.mlp, block.mlp_norm)):
            f = branch(x)
            variances.append(float(f[0].detach().double().var(correction=0)))
            x = layer_norm(next(numbers) * x + f, (32,), norm.weight, norm.bias, 1e-5)
    return x


def test_a_post_norm_model_computes_its_equations() -> None:
    for words in ([POST], ADMIN):
        model = build_model(run_config(words), 64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        sums = [part.weight for part in model.modules() if isinstance(part, ResidualWeight)]
        assert len(sums) == (6 if words == ADMIN else 0)
        batch = tokens()
        expected = plain(model, batch, sums or [torch.ones(32)] * 6, [])
        torch.testing.assert_close(model.hidden_states(batch), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(batch), model.logits(expected), rtol=1e-5, atol=1e-5)


def measured(model: GPT, batch: torch.Tensor) -> list[float]:
    """Omegas of a first forward pass."""
    method = Admin(model)
    # No optimizer step is made, so the engine is not asked for anything.
    method.attach(SimpleNamespace(), SimpleNamespace(from_first=lambda tensor: tensor))
    method.begin_step(Step(0))
    model.train()(batch)
    found = method.state()["offsets"]
    assert found[0] == 1
    # Only once.
    method.begin_step(Step(1))
    model(tokens())
    assert torch.equal(method.state()["offsets"], found)
    other = Admin(build_model(run_config(ADMIN), 64))
    other.load_state(method.state())
    assert torch.equal(other.state()["offsets"], found)
    return (1 + found[1:]).tolist()


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_weights_follow_from_the_variances_of_masked_branches(density: float) -> None:
    model, batch = build_model(run_config([*ADMIN, "model.init_std=0.3"]), 64), tokens()
    for layer in model.sparse_layers().values():
        layer.mask.copy_(torch.rand(layer.mask.shape) < density)
        layer.weight.data *= layer.mask.repeat_interleave(8, 0).repeat_interleave(8, 1)
        layer.topology_changed()
    omegas, variances = measured(model, batch), []
    expected = plain(model, batch, [torch.tensor(omega) for omega in omegas], variances)
    assert omegas == pytest.approx([sqrt(1 + sum(variances[:n])) for n in range(6)], rel=1e-5)
    assert max(omegas) > 1.1
    torch.testing.assert_close(model.hidden_states(batch), expected, rtol=1e-4, atol=1e-4)
    # What branches read has variance 1, the first one apart.
    torch.testing.assert_close(expected.var(-1, correction=0), torch.ones(4, 16), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["model.residual_weight=admin"], "model.normalization_position"),
        ([POST, "layer_dropping.theta=0.5"], "layer_dropping.theta"),
        ([*ADMIN, "train.compile=blocks"], "train.compile"),
        ([*ADMIN, "stacking.num_layers=1"], "stacking.num_layers"),
        ([*ADMIN, "parallel.sequence_parallel=true", "parallel.tensor_parallel_size=2"], "parallel.sequence_parallel"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: .*must be"):
        check_run(run_config(words), 2)


def test_no_architecture_of_transformers_takes_it() -> None:
    with pytest.raises(ConfigError, match="model.normalization_position is 'post'; must be one of 'pre'"):
        choose_architecture(run_config([POST]))
