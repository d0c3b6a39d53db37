"""Gradients of the micro-batches of a step that are added up in float32, while the model computes in bfloat16."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from engine_runs import Layout, build, make_batches, run_cases, run_config
from harness import run_distributed

from megasparse.parallel import Mesh

COMMON = ["train.precision=bf16", "model.hidden_size=32", "sparsity.block_size=8"]
LAYOUTS = {
    "stage 2": ([], Layout(data=2, zero=2, accumulation=4)),
    "stage 3": ([], Layout(data=2, zero=3, accumulation=4)),
    "stage 2, offloaded": (["deepspeed.offload_optimizer=cpu"], Layout(data=2, zero=2, accumulation=4)),
}


def overrides(name: str, dtype: str) -> list[str]:
    return [*COMMON, *LAYOUTS[name][0], f"deepspeed.gradient_accumulation_dtype={dtype}"]


def gradient(mesh: Mesh, name: str, dtype: str) -> torch.Tensor:
    """All of this rank's gradient after the micro-batches of the first step."""
    config = run_config(overrides(name, dtype), LAYOUTS[name][1])
    engine, _ = build(mesh, config)
    batch = make_batches(config)[0]
    for micro in batch[mesh.data_parallel.rank :: 2].split(1):
        engine.backward(engine.forward(micro[:, :-1], micro[:, 1:]))
    fragments = engine.access(dict(engine.model.named_parameters())).fragments().values()
    return torch.cat([fragment.gradient.reshape(-1).float() for fragment in fragments])


def everything(mesh: Mesh) -> dict[str, dict]:
    cases = [(name, overrides(name, "fp32"), layout) for name, (_, layout) in LAYOUTS.items()]
    found = {name: {dtype: gradient(mesh, name, dtype) for dtype in ("precision", "fp32")} for name in LAYOUTS}
    return {"gradients": found, "runs": run_cases(mesh, cases)}


@cache
def results() -> dict[str, dict]:
    return run_distributed(everything, 2, timeout=300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_sums_keep_more_bits_than_the_parts_have(name) -> None:
    found = results()["gradients"][name]
    plain, exact = found["precision"], found["fp32"]
    rounded = (exact == exact.bfloat16()).float().mean()
    assert rounded < 0.5, "sums of bfloat16 numbers need more bits"
    if "offloaded" not in name:  # there they are float32 anyway
        assert torch.equal(plain, plain.bfloat16().float())
    # Four numbers of 8 significant bits, and what the average over the ranks rounds.
    assert (plain - exact).norm() < 2**-7 * exact.norm() and not torch.equal(plain, exact)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_keeps_its_invariants(name) -> None:
    """``run_cases`` has looked at weights and moments after every step."""
    run = results()["runs"][name]
    assert len(run["digests"]) > 2 and run["losses"].isfinite().all()
