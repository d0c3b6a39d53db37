"""Blocks that torch.compile traces train like others through all phases; `train.compile`."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch
from engine_runs import Layout, build, divided, make_batches, run_config, train_step
from harness import run_distributed
from packed_runs import run_cases
from torch import nn

from megasparse.parallel import Mesh

SETTINGS = ["model.hidden_size=64", "sparsity.block_size=16", "run.name=compiled-3", "train.valid_samples=8"]


def losses(mesh: Mesh, layout: Layout, words: list[str], backend: str) -> dict[str, Any]:
    """Of runs without and with compiled blocks: losses, the validation loss after them, and what was traced."""
    import torch._dynamo as dynamo

    if backend != "inductor":
        # Inductor compiles C++ for a minute, and torch's part of it needs no test of ours.
        nn.Module.compile = partialmethod(nn.Module.compile, backend=backend)
    mesh, found = divided(mesh, layout.tensor), {}
    for kind in ("none", "blocks"):
        dynamo.reset()
        dynamo.utils.counters.clear()
        config = run_config([*SETTINGS, f"train.compile={kind}", *words], layout)
        engine, controller = build(mesh, config)
        batches = make_batches(config)
        steps = [train_step(mesh, engine, controller, number, batch)["loss"] for number, batch in enumerate(batches)]
        part = batches[0][: config.train.micro_batch_size - 1]
        counters = dynamo.utils.counters
        traced = counters["stats"]["unique_graphs"]
        found[kind] = {
            "losses": torch.tensor([float(loss) for loss in steps], dtype=torch.float64),
            "validation": float(engine.evaluate(part[:, :-1], part[:, 1:])),
            "traced": traced,
            "traced_by_validation": counters["stats"]["unique_graphs"] - traced,
            "breaks": sum(counters["graph_break"].values()),
            "given_up": sum("limit" in reason for reason in counters["unimplemented"]),
        }
    return found


def packed_losses(mesh: Mesh) -> dict[str, Any]:
    """Of runs with packed storage, whose engine is built anew some times, without and with compiled blocks."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    cases = [
        (
            kind,
            [*SETTINGS, "sparsity.storage=packed", "sparsity.capacity_change_cost=0", f"train.compile={kind}"],
            Layout(),
            [],
        )
        for kind in ("none", "blocks")
    ]
    return {kind: {name: run[name] for name in ("losses", "held")} for kind, run in run_cases(mesh, cases).items()}


@pytest.mark.exhaustive
def test_compiled_blocks_and_packed_storage_go_together() -> None:
    found = run_distributed(packed_losses, 1, timeout=900)[0]
    plain, compiled = found["none"], found["blocks"]
    torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=2e-6, atol=0)
    assert compiled["held"] == plain["held"] and len(set(compiled["held"])) > 2


@pytest.mark.parametrize(
    ("layout", "words", "backend"),
    [
        (Layout(1, 1, 1, 1), [], "aot_eager"),
        pytest.param(
            Layout(1, 1, 1, 2), ["train.activation_recomputation=true"], "inductor", marks=pytest.mark.exhaustive
        ),
        pytest.param(Layout(2, 1, 3, 1), [], "inductor", marks=pytest.mark.exhaustive),
        pytest.param(Layout(1, 2, 1, 1), [], "inductor", marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_run_with_compiled_blocks_has_the_same_losses(layout, words, backend) -> None:
    found = run_distributed(losses, layout.world_size, layout, words, backend, timeout=900)[0]
    plain, compiled = found["none"], found["blocks"]
    # float32 carries 6e-8; sums of some hundred terms in another order, and 24 steps of training with them.
    torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=2e-6, atol=0)
    assert compiled["validation"] == pytest.approx(plain["validation"], rel=2e-6)
    assert plain["traced"] == 0 < compiled["traced"]
    assert compiled["traced_by_validation"] == compiled["given_up"] == 0
    if layout.zero < 3:
        # DeepSpeed's hooks that gather weights cut the graph.
        assert compiled["breaks"] == 0
