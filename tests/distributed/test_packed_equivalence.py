"""Packed storage against MST written down plainly, which knows of no storage, process or shard: losses, gradient norms,
masks after every step, weights and moments while the model is packed and when it is dense again.

ZeRO 0 to 3, one and two data-parallel and tensor-parallel ranks, accumulation; packed storage keeps tensor-parallel
shards in balance, and so does the plain run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from engine_runs import LAYOUTS, Layout, make_batches, run_config
from harness import run_distributed
from packed_runs import WORDS, run_cases
from plain_mst import PlainTraining
from test_mst_equivalence import FAIR_MARGIN, LOSS_RTOL, MOMENT_RTOL, NORM_RTOL, WEIGHT_ATOL

from megasparse.config.schema import RunConfig
from megasparse.sparsity.topology import unpack_bits

RECIPES = {
    "blocks": [],
    "ages_of_blocks": ["sparsity.regrowth_warmup_steps=4"],
    "skipped_updates": ["sparsity.skip_optimizer_on_update=true"],
    "tied_head": ["sparsity.head=true"],
    "regrown_blocks": ["sparsity.regrown=keep"],
    "random_growth": ["sparsity.growth=random"],
    "gradient_scores": ["sparsity.drop_score=magnitude_gradient", "sparsity.drop_score_lambda=0.5"],
    "llama": [
        "model.num_key_value_heads=2",
        "model.activation=swiglu",
        "model.ffn_hidden_size=64",
        "model.normalization=rmsnorm",
        "model.position_embedding=rope",
        "model.tie_embeddings=false",
    ],
}
FEW_LAYOUTS = [Layout(1, 1, 0, 1), Layout(2, 1, 1, 2), Layout(1, 2, 2, 1), Layout(2, 2, 3, 2)]
CASES = [(recipe, layout) for recipe in RECIPES for layout in (LAYOUTS if recipe == "blocks" else FEW_LAYOUTS)]
USUAL = [
    ("blocks", Layout(2, 1, 0, 1)),
    ("blocks", Layout(2, 1, 2, 2)),
    ("blocks", Layout(2, 1, 3, 2)),
    ("blocks", Layout(1, 2, 1, 2)),
    ("llama", Layout(1, 2, 2, 1)),
]
"""On two ranks, so that one start does for all; the others with `--exhaustive`."""
SPARSEST, LAST = 10, 23
"""Steps whose weights and moments are compared: in the ultra-sparse phase, between two topology updates; the last."""


def words_of(recipe: str, shards: int) -> list[str]:
    return [*WORDS, *RECIPES[recipe], *(["sparsity.balance_shards=true"] if shards > 1 else [])]


@cache
def reference(recipe: str, shards: int) -> tuple[dict[str, Any], RunConfig, int]:
    """The plain run, its configuration, and the first data seed whose decisions are all clear."""
    config = run_config(words_of(recipe, shards))
    for seed in range(40):
        plain, found = PlainTraining(config, make_batches(config, seed), shards), {"states": {}}
        steps, masks = [], []
        for step, batch in enumerate(plain.batches):
            steps.append(plain.train_step(step, batch))
            masks.append({name: mask.clone() for name, mask in plain.masks.items()})
            if step in (SPARSEST, LAST):
                found["states"][str(step)] = {
                    **{f"fp32/{name}": weight.detach().clone() for name, weight in plain.weights.items()},
                    **{f"exp_avg/{name}": moment.clone() for name, moment in plain.first.items()},
                    **{f"exp_avg_sq/{name}": moment.clone() for name, moment in plain.second.items()},
                }
        losses, norms = torch.tensor(steps, dtype=torch.float64).unbind(1)
        if plain.margin > FAIR_MARGIN:
            return {**found, "losses": losses, "norms": norms, "masks": masks}, config, seed
    raise AssertionError("no data seed with clear decisions")


def name_of(recipe: str, layout: Layout) -> str:
    return f"{recipe}-{layout}"


class Results(dict):
    """What rank 0 returns of all cases of a world size; its processes run when it is first asked for."""

    def __init__(self, everything: bool) -> None:
        self.everything = everything

    def __missing__(self, world: int) -> dict[str, Any]:
        cases = []
        for recipe, layout in CASES:
            if layout.world_size == world and (self.everything or (recipe, layout) in USUAL):
                seed = f"run.name=data-{reference(recipe, layout.tensor)[2]}"
                # Words of all packed runs come before these.
                words = [*words_of(recipe, layout.tensor)[len(WORDS) :], "sparsity.storage=packed", seed]
                cases.append((name_of(recipe, layout), words, layout, []))
        self[world] = run_distributed(run_cases, world, cases, (SPARSEST, LAST), timeout=1800)[0]
        return self[world]


@pytest.fixture(scope="module")
def results(pytestconfig) -> Results:
    return Results(pytestconfig.getoption("exhaustive"))


def unpacked(bits: torch.Tensor, block_size: int, shape: torch.Size) -> torch.Tensor:
    units = unpack_bits(bits, shape.numel() // block_size**2).view(shape[0] // block_size, shape[1] // block_size)
    return torch.kron(units, torch.ones(block_size, block_size, dtype=torch.bool))


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [pytest.param(*case, marks=() if case in USUAL else pytest.mark.exhaustive) for case in CASES],
    ids=str,
)
def test_packed_training_equals_the_plain_one(results, recipe, layout) -> None:
    plain, config, _ = reference(recipe, layout.tensor)
    ours = results[layout.world_size][name_of(recipe, layout)]
    assert ours["held"][0] == ours["held"][LAST] == 0 < ours["held"][SPARSEST] < max(ours["held"])
    for step, (mine, masks) in enumerate(zip(ours["masks"], plain["masks"], strict=True)):
        assert set(mine) == set(masks)
        for name, mask in masks.items():
            wrong = int((unpacked(mine[name], config.sparsity.block_size, mask.shape) != mask).sum())
            assert wrong == 0, f"step {step}: {wrong} mask entries of {name} differ"
    torch.testing.assert_close(ours["losses"], plain["losses"], rtol=LOSS_RTOL, atol=0)
    torch.testing.assert_close(ours["norms"], plain["norms"], rtol=NORM_RTOL, atol=0)
    for step, state in plain["states"].items():
        found = ours["states"][step]
        assert set(state) <= set(found)
        for key, tensor in state.items():
            is_weight = key.startswith("fp32/")
            bound = WEIGHT_ATOL if is_weight else MOMENT_RTOL * float(tensor.abs().max())
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=bound, msg=f"{key} after step {step}")


@pytest.mark.parametrize("shards", [1, 2])
def test_the_reference_is_sparse_where_it_is_compared_and_dense_at_the_end(shards) -> None:
    plain, _, _ = reference("blocks", shards)
    active = [sum(int(mask.sum()) for mask in masks.values()) for masks in plain["masks"]]
    assert active[LAST] == active[0] == max(active) and active[SPARSEST] == min(active) < 0.21 * active[0]
    assert any((plain["masks"][8][name] != mask).any() for name, mask in plain["masks"][SPARSEST].items())
