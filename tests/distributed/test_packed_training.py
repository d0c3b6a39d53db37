"""Packed storage trains as dense storage does: the same masks after every step, losses to 1e-5, in every layout; and an
engine that is built anew where nothing changes goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_runs import Layout
from harness import run_distributed
from packed_runs import run_cases

PACKED, DENSE = "sparsity.storage=packed", "sparsity.storage=dense"
REBUILDS = [1, 2, 5, 6, 8, 11, 12, 16, 20]
"""Dense, right before a topology update, right after one, where the capacity changes anyway."""

STAGES = {f"stage {zero}": ([], Layout(zero=zero, accumulation=2)) for zero in range(4)}
TWO_RANKS = {f"stage {zero}": ([], Layout(data=2, zero=zero)) for zero in range(4)} | {
    "accumulation": ([], Layout(data=2, zero=2, accumulation=2)),
    "bf16": (["train.precision=bf16"], Layout(data=2, zero=3)),
    "offload": (["deepspeed.offload_optimizer=cpu"], Layout(data=2, zero=2)),
    "tensor parallel": (["sparsity.balance_shards=true"], Layout(tensor=2, zero=1)),
    "sequence parallel": (
        ["sparsity.balance_shards=true", "parallel.sequence_parallel=true"],
        Layout(tensor=2, zero=3),
    ),
    "tied head": (["sparsity.head=true", "model.tie_embeddings=true"], Layout(data=2, zero=3)),
    "born sparse, tied head": (
        ["sparsity.head=true", "model.tie_embeddings=true", "sparsity.algorithm=rigl"],
        Layout(data=2, zero=3),
    ),
}
COVERED = (*STAGES, "accumulation", "tensor parallel", "tied head")
"""Only with `--exhaustive`: test_packed_equivalence has these on two ranks, or another case has what they have."""
USUAL_ON_TWO_RANKS = {name: case for name, case in TWO_RANKS.items() if name not in COVERED}
FOUR_RANKS = {
    "data 4, stage 2": ([], Layout(data=4, zero=2)),
    "data 2, tensor 2, stage 3": (["sparsity.balance_shards=true"], Layout(2, 2, 3, 2)),
}
RULES = {
    "born sparse": ["sparsity.algorithm=rigl", "sparsity.init_density_power=0.5"],
    "regrown keep": ["sparsity.regrown=keep", "sparsity.drop_anneal=none"],
    "skipped updates": ["sparsity.skip_optimizer_on_update=true", "sparsity.regrowth_warmup_steps=4"],
    "low rank": ["sparsity.low_rank=2", "sparsity.drop_score=snip"],
    "groups": [
        "sparsity.groups=[{pattern: '*.mlp.*', density: 0.5, block_size: 4}, {pattern: layers.0.*, dense: true}]"
    ],
    "kernels": ["sparsity.block_size=16", "model.hidden_size=64"],
    "head": ["sparsity.head=true", "model.tie_embeddings=false"],
}
MORE_RULES = {
    "points": ["sparsity.points=[[0,0.4],[0.4,0.15],[0.7,0.5],[0.9,0.3]]"],
    "random growth": ["sparsity.growth=random"],
    "static": ["sparsity.algorithm=static"],
    "row floor": ["sparsity.row_floor=true", "sparsity.density=0.4"],
    "step counts": ["sparsity.per_weight_step_counts=true"],
    "erdos-renyi": ["sparsity.distribution=erdos_renyi", "sparsity.depth_boost=0.5"],
    "drop by weight and gradient": ["sparsity.drop_score=magnitude_gradient"],
    "drop by quotient": ["sparsity.drop_score=magnitude_over_gradient"],
    "torch's optimizer": ["kernels.optimizer=torch"],
    "recomputation": ["train.activation_recomputation=true"],
}


def both(cases: dict[str, tuple[list[str], Layout]]) -> list:
    return [
        (f"{name}, {storage}", [*words, storage], layout, [])
        for name, (words, layout) in cases.items()
        for storage in (DENSE, PACKED)
    ]


def compare(results: list[dict[str, Any]], name: str, tolerance: float = 1e-5) -> None:
    for of_rank in results:
        dense, packed = of_rank[f"{name}, {DENSE}"], of_rank[f"{name}, {PACKED}"]
        assert not any(dense["held"]) and any(packed["held"]), "it was packed for a while"
        for step, (theirs, mine) in enumerate(zip(dense["masks"], packed["masks"], strict=True)):
            assert theirs.keys() == mine.keys()
            for layer in theirs:
                assert torch.equal(theirs[layer], mine[layer]), f"masks of {layer} after step {step}"
        assert torch.allclose(dense["losses"], packed["losses"], rtol=0, atol=tolerance)
        assert torch.allclose(dense["norms"], packed["norms"], rtol=tolerance, atol=0)
        assert dense["state"].keys() == packed["state"].keys()
        for key, tensor in dense["state"].items():
            assert torch.allclose(tensor.double(), packed["state"][key].double(), atol=tolerance), key


@pytest.fixture(scope="module")
def one_rank(pytestconfig) -> list[dict[str, Any]]:
    stages = STAGES if pytestconfig.getoption("exhaustive") else {name: STAGES[name] for name in USUAL_STAGES}
    rebuilt = [(f"{name}, rebuilt", [*words, PACKED], layout, REBUILDS) for name, (words, layout) in stages.items()]
    return run_distributed(run_cases, 1, [*both(stages), *rebuilt], timeout=900)


# Two ranks go through all of them.
USUAL_STAGES = ("stage 0",)
stages = pytest.mark.parametrize(
    "name", [name if name in USUAL_STAGES else pytest.param(name, marks=pytest.mark.exhaustive) for name in STAGES]
)


@stages
def test_every_stage_on_one_rank(one_rank, name) -> None:
    compare(one_rank, name)
    held = one_rank[0][f"{name}, {PACKED}"]["held"]
    assert held[0] == held[-1] == 0 and len(set(held)) == 4, held


@stages
def test_an_engine_that_is_built_anew_goes_on_bit_for_bit(one_rank, name) -> None:
    expected, found = one_rank[0][f"{name}, {PACKED}"], one_rank[0][f"{name}, rebuilt"]
    for key in ("losses", "norms"):
        assert torch.equal(expected[key], found[key]), key
    assert expected["held"] == found["held"]
    assert all(torch.equal(expected["state"][key], found["state"][key]) for key in expected["state"])


@pytest.fixture(scope="module")
def two_ranks(pytestconfig) -> list[dict[str, Any]]:
    cases = TWO_RANKS if pytestconfig.getoption("exhaustive") else USUAL_ON_TWO_RANKS
    return run_distributed(run_cases, 2, both(cases), timeout=1800)


@pytest.mark.parametrize(
    "name",
    [name if name in USUAL_ON_TWO_RANKS else pytest.param(name, marks=pytest.mark.exhaustive) for name in TWO_RANKS],
)
def test_two_ranks(two_ranks, name) -> None:
    # bfloat16 rounds each gradient to 2^-9 of it; sums of other orders differ by as much.
    compare(two_ranks, name, 2e-2 if name == "bf16" else 1e-5)


@pytest.mark.exhaustive
def test_four_ranks() -> None:
    results = run_distributed(run_cases, 4, both(FOUR_RANKS), timeout=900)
    for name in FOUR_RANKS:
        compare(results, name)


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    return run_distributed(run_cases, 1, both({name: (w, Layout(zero=2)) for name, w in RULES.items()}), timeout=1800)


@pytest.mark.parametrize("name", RULES)
def test_rules_of_topology_updates(rules, name) -> None:
    compare(rules, name)


@pytest.mark.exhaustive
def test_more_rules_of_topology_updates() -> None:
    cases = both({name: (words, Layout(zero=2)) for name, words in MORE_RULES.items()})
    results = run_distributed(run_cases, 1, cases, timeout=1800)
    for name in MORE_RULES:
        compare(results, name)
