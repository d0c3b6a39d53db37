"""Every layout goes on from a checkpoint of every layout, in every phase, without a tool: what is restored is what was
saved, bit for bit, and the next steps have the losses of the run that never stopped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from engine_runs import Layout
from harness import run_distributed
from pair_runs import PHASES, resume_all, save_all

LAYOUTS = [
    Layout(data=ranks // tensor, tensor=tensor, zero=zero)
    for ranks in (1, 2, 4)
    for tensor in (1, 2)
    for zero in (0, 1, 2, 3)
    if tensor <= ranks
]
RECIPES = {
    "blocks": ["model.hidden_size=64", "sparsity.block_size=16", "model.tie_embeddings=false"],
    "weights": ["model.hidden_size=32", "sparsity.block_size=1", "sparsity.head=true"],
}
# Sums in another order; see test_resume_matrix.
LOSS_RTOL = 1e-5

pytestmark = [pytest.mark.timeout(1800), pytest.mark.exhaustive]


@cache
def all_results(recipe: str, folder: Path) -> tuple[dict, dict]:
    saved, resumed = {}, {}
    worlds = {ranks: [layout for layout in LAYOUTS if layout.world_size == ranks] for ranks in (1, 2, 4)}
    for ranks, layouts in worlds.items():
        saved |= run_distributed(save_all, ranks, layouts, RECIPES[recipe], folder / recipe, timeout=900)[0]
    sources = [(source, phase) for source in saved for phase in PHASES]
    for ranks, layouts in worlds.items():
        found = run_distributed(resume_all, ranks, layouts, sources, RECIPES[recipe], folder / recipe, timeout=1500)
        resumed |= found[0]
    return saved, resumed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layout_goes_on_from_every_other(folder, recipe, target) -> None:
    saved, resumed = all_results(recipe, folder)
    assert len(saved) == 20 and len(resumed) == 20 * 20 * 3
    for source, phases in saved.items():
        for phase, (digest, losses) in phases.items():
            found, after = resumed[f"{source} {phase} {target}"]
            assert found == digest, f"{source} {phase}: another state"
            exact = source == str(target)
            wanted = losses if exact else pytest.approx(losses, rel=LOSS_RTOL)
            assert after == wanted, f"{source} {phase}: another curve"
