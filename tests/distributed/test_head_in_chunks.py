"""The chunked head under DeepSpeed: the same losses as with one chunk in a process of its own, in every ZeRO stage.

The weight of the head belongs to another module than the one that uses it, and its gradient is made in the forward
pass: both are what ZeRO stage 3, which holds a weight only while its module runs, might not expect.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from engine_runs import Layout, build, divided, make_batches, run_config, train_step
from harness import run_distributed

from megasparse.parallel import Mesh

COMMON = ["model.hidden_size=32", "sparsity.block_size=8", "sparsity.algorithm=rigl", "train.steps=7"]
RECIPES = {
    "tied": COMMON,
    "sparse-tied": [*COMMON, "sparsity.head=true"],
    "sparse-low-rank": [*COMMON, "sparsity.head=true", "model.tie_embeddings=false", "sparsity.low_rank=4"],
    "recomputation": [*COMMON, "model.tie_embeddings=false", "train.activation_recomputation=true"],
    "onednn": [*COMMON, "kernels.dense=onednn"],
    "sequence": [*COMMON, "sparsity.head=true", "parallel.sequence_parallel=true"],
}
CASES = [
    *((recipe, Layout(2, 1, zero, 2)) for recipe in ("tied", "sparse-low-rank") for zero in (0, 1, 2, 3)),
    ("onednn", Layout(2, 1, 0, 2)),
    ("onednn", Layout(2, 1, 3, 2)),
    ("onednn", Layout(1, 2, 1, 1)),
    ("sparse-tied", Layout(2, 1, 3, 1)),
    ("sparse-tied", Layout(1, 2, 0, 1)),
    ("sparse-low-rank", Layout(1, 2, 3, 1)),
    ("recomputation", Layout(2, 1, 3, 1)),
    ("sequence", Layout(1, 2, 1, 1)),
]
FURTHER = [
    *(("tied", Layout(2, 1, zero, 2)) for zero in (1, 2)),
    *(("sparse-low-rank", Layout(2, 1, zero, 2)) for zero in (0, 3)),
    ("onednn", Layout(2, 1, 0, 2)),
    ("sparse-tied", Layout(1, 2, 0, 1)),
]
"""With `--exhaustive`: other cases have what they have."""
# Float32 carries 1.2e-7; see test_mst_equivalence.
LOSS_RTOL = 2e-6


def losses(mesh: Mesh, recipe: str, layout: Layout, chunk_rows: int | None) -> list[float]:
    """Of an evaluation before anything was trained, of all steps, and of an evaluation after them."""
    overrides = [line for line in RECIPES[recipe] if layout.tensor > 1 or "sequence_parallel" not in line]
    engine, controller = build(divided(mesh, layout.tensor), run_config(overrides, layout))
    if chunk_rows is not None:
        engine.model.head_in_chunks.chunk_elements = chunk_rows * engine.model.vocabulary.share
    batches = make_batches(engine.config)
    inputs, targets = batches[0][:, :-1], batches[0][:, 1:]
    found = [float(engine.evaluate(inputs, targets))]
    found += [float(train_step(engine.mesh, engine, controller, s, batch)["loss"]) for s, batch in enumerate(batches)]
    return [*found, float(engine.evaluate(inputs, targets))]


def run_cases(mesh: Mesh, cases: list[tuple[str, Layout]], chunk_rows: int | None) -> dict[str, list[float]]:
    return {f"{recipe}-{layout}": losses(mesh, recipe, layout, chunk_rows) for recipe, layout in cases}


@cache
def in_one_chunk() -> dict[str, list[float]]:
    alone = Layout(1, 1, 0, 1)
    found = run_distributed(run_cases, 1, [(recipe, alone) for recipe in RECIPES], None)[0]
    return {recipe: found[f"{recipe}-{alone}"] for recipe in RECIPES}


@pytest.fixture(scope="module")
def in_chunks(pytestconfig) -> dict[str, list[float]]:
    cases = CASES if pytestconfig.getoption("exhaustive") else [case for case in CASES if case not in FURTHER]
    return run_distributed(run_cases, 2, cases, 13)[0]


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [pytest.param(*case, marks=pytest.mark.exhaustive if case in FURTHER else ()) for case in CASES],
    ids=str,
)
def test_chunks_train_as_one(in_chunks, recipe, layout) -> None:
    ours, expected = (torch.tensor(x).double() for x in (in_chunks[f"{recipe}-{layout}"], in_one_chunk()[recipe]))
    torch.testing.assert_close(ours, expected, rtol=LOSS_RTOL, atol=0)
    assert expected[-1] < expected[0] - 0.01, "nothing was learned"
