"""One data-parallel rank: gradients that stay where they are train to the bits of those that DeepSpeed copies."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import pytest
import torch
from engine_runs import Layout, build, make_batches, run_case, run_config
from harness import run_distributed

from megasparse.engine import training_engine
from megasparse.parallel import Mesh

COMMON = ["model.hidden_size=32", "sparsity.block_size=8", "train.steps=16"]
CASES = {
    f"zero {stage}, {precision}, {micro_batches} micro-batches, {summed}": (
        [*COMMON, f"train.precision={precision}", f"deepspeed.gradient_accumulation_dtype={summed}"],
        Layout(zero=stage, accumulation=micro_batches),
    )
    for stage, precision, micro_batches, summed in [
        (0, "fp32", 2, "precision"),
        (1, "fp32", 1, "precision"),
        (1, "bf16", 1, "precision"),
        (1, "bf16", 2, "precision"),
        (2, "bf16", 2, "precision"),
        (2, "bf16", 2, "fp32"),
    ]
}


def both(mesh: Mesh, name: str) -> list[dict]:
    overrides, layout = CASES[name]
    config = run_config(overrides, layout)
    found = [run_case(mesh, config)]
    with patch.object(training_engine, "leave_gradients_in_place", lambda engine: None):
        found.append(run_case(mesh, config))
    return found


def lies_in_place(mesh: Mesh, stage: int) -> bool:
    """Whether the optimizer gets the very gradients that the backward pass made."""
    config = run_config([*COMMON, "train.precision=bf16"], Layout(zero=stage))
    engine, _ = build(mesh, config)
    batch, made = make_batches(config)[0], {}
    for parameter in engine.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: made.__setitem__(p, p.grad.data_ptr()))
    engine.backward(engine.forward(batch[:, :-1], batch[:, 1:]))
    zero = engine._engine.optimizer
    held = [gradient.data_ptr() for group in zero.averaged_gradients.values() for gradient in group]
    return set(made.values()) <= set(held)


def everything(mesh: Mesh) -> dict:
    return {
        "runs": {name: both(mesh, name) for name in CASES},
        "in place": {stage: lies_in_place(mesh, stage) for stage in (1, 2)},
    }


@cache
def results() -> dict:
    return run_distributed(everything, 1, timeout=300)[0]


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_weights_are_those_of_copied_gradients(name: str) -> None:
    ours, copied = results()["runs"][name]
    for kind in ("losses", "norms"):
        assert torch.equal(ours[kind], copied[kind])
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for parameter, values in ours[kind].items():
            assert torch.equal(values, copied[kind][parameter]), (kind, parameter)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_optimizer_takes_them_where_the_backward_pass_has_put_them(stage: int) -> None:
    assert results()["in place"][stage]
