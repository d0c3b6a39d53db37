"""Runs that go on in another layout: other data-parallel and tensor-parallel sizes, other ZeRO stages.

Each source trains to a checkpoint and on to the end; other layouts go on from the checkpoint, and must give the same
topologies bit for bit and the same curve but for rounding. On the way the reader's tensors are compared with what the
source's engine held.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from engine_runs import Layout, make_batches, run_config
from harness import run_distributed
from plain_mst import PlainTraining
from resume_runs import STOP, run_layouts

from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.weights import load_model_weights

BLOCKS = ["model.hidden_size=64", "sparsity.block_size=16"]
WEIGHTS = ["model.hidden_size=32", "sparsity.block_size=1"]
PERSISTENCE = "deepspeed.extra.zero_optimization.stage3_param_persistence_threshold"
RECIPES = {
    "blocks": [*BLOCKS, "model.tie_embeddings=false"],
    "weights": WEIGHTS,
    "per-weight steps": [*WEIGHTS, "sparsity.per_weight_step_counts=true", "sparsity.regrowth_warmup_steps=4"],
    # At stage 3 vectors and the smaller matrices stay whole on every rank.
    "tied_head": [*BLOCKS, "sparsity.head=true", f"{PERSISTENCE}=5000"],
    "bfloat16": [*BLOCKS, "train.precision=bf16", "deepspeed.offload_optimizer=cpu"],
}
# Recipe, where it is saved, where it goes on. The later ones repeat the earlier ones with other recipes and stages.
RESUMES = [
    ("blocks", Layout(data=2), [Layout(), Layout(data=4)]),
    ("weights", Layout(data=2), [Layout(zero=0), Layout(zero=3), Layout(tensor=2)]),
    ("tied_head", Layout(tensor=2), [Layout(), Layout(tensor=4), Layout(data=2, tensor=2, zero=3)]),
    ("weights", Layout(), [Layout(data=2), Layout(tensor=2), Layout(zero=2), Layout(zero=3)]),
    ("blocks", Layout(zero=3), [Layout(), Layout(data=2, zero=3)]),
    ("per-weight steps", Layout(data=2, zero=3), [Layout(), Layout(data=4, zero=3), Layout(tensor=2, zero=3)]),
    ("blocks", Layout(tensor=2, zero=3), [Layout(zero=0), Layout(tensor=4, zero=3), Layout(data=2, zero=2)]),
    ("per-weight steps", Layout(tensor=2, zero=2), [Layout(), Layout(data=2, tensor=2)]),
    ("tied_head", Layout(zero=0), [Layout(), Layout(data=2), Layout(tensor=2, zero=3)]),
    ("bfloat16", Layout(data=2, zero=2), [Layout(zero=3), Layout(tensor=2)]),
]
NUM_USUAL = 4


def resumes(everything: bool) -> list[tuple[str, Layout, list[Layout]]]:
    return RESUMES if everything else RESUMES[:NUM_USUAL]


def resumed_cases(everything: bool) -> list[tuple[str, Layout, Layout]]:
    return [(recipe, source, target) for recipe, source, targets in resumes(everything) for target in targets]


def marked(usual: list[tuple], everything: list[tuple]) -> list:
    return [pytest.param(*case, marks=() if case in usual else pytest.mark.exhaustive) for case in everything]


SOURCES = marked(*([(recipe, source) for recipe, source, _ in resumes(each)] for each in (False, True)))
CASES = marked(resumed_cases(False), resumed_cases(True))

# As between layouts of an uninterrupted run, see test_mst_equivalence.
LOSS_RTOL = 1e-5
NORM_RTOL = 3e-4
FAIR_MARGIN = 2e-5
# In bfloat16 other layouts come to other units now and then.
BFLOAT16_LOSS_RTOL = 2e-2

# The first test of each kind waits for all runs.


def source_name(recipe: str, source: Layout) -> str:
    return f"{recipe}-{source}"


def case_name(recipe: str, source: Layout, target: Layout) -> str:
    return f"{recipe}-{source}-to-{target}"


@cache
def overrides(recipe: str) -> list[str]:
    """The recipe with the first data seed whose topology decisions are all clear: no luck of rounding in any layout."""
    config = run_config(RECIPES[recipe])
    for seed in range(40):
        plain = PlainTraining(config, make_batches(config, seed))
        plain.run()
        if plain.margin > FAIR_MARGIN:
            return [*RECIPES[recipe], f"run.name=data-{seed}"]
    raise AssertionError("no data seed with clear decisions")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def sources(folder, pytestconfig) -> dict[str, list[dict]]:
    """What every rank of every source returns."""
    wanted = resumes(pytestconfig.getoption("exhaustive"))
    found = {}
    for world_size in sorted({source.world_size for _, source, _ in wanted}):
        cases = [
            (
                source_name(recipe, source),
                source,
                overrides(recipe),
                folder / source_name(recipe, source) / "checkpoints",
            )
            for recipe, source, _ in wanted
            if source.world_size == world_size
        ]
        ranks = run_distributed(run_layouts, world_size, "save", cases)
        found |= {name: [rank[name] for rank in ranks] for name, *_ in cases}
    return found


@pytest.fixture(scope="module")
def checkpoints(folder, sources) -> dict[str, Path]:
    """Checkpoint folders by source."""
    return {name: folder / name / "checkpoints" / f"step-{STOP:08d}" for name in sources}


@pytest.fixture(scope="module")
def resumed(checkpoints, pytestconfig) -> dict[str, list[dict]]:
    """What every rank of every resumed run returns."""
    wanted = resumed_cases(pytestconfig.getoption("exhaustive"))
    found = {}
    for world_size in sorted({target.world_size for _, _, target in wanted}):
        cases = [
            (case_name(*case), case[2], overrides(case[0]), checkpoints[source_name(*case[:2])].parent)
            for case in wanted
            if case[2].world_size == world_size
        ]
        ranks = run_distributed(run_layouts, world_size, "resume", cases)
        found |= {name: [rank[name] for rank in ranks] for name, *_ in cases}
    return found


@pytest.mark.parametrize(("recipe", "source"), SOURCES, ids=str)
def test_the_reader_gives_what_the_engine_held(sources, checkpoints, recipe, source) -> None:
    name = source_name(recipe, source)
    saved = sources[name][0]["saved"]
    reader = Checkpoint(checkpoints[name])
    assert list(reader.shapes) == list(saved["weights"]) and reader.step == STOP
    for kind, key in (("fp32", "weights"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
        for parameter, expected in saved[key].items():
            found = reader.tensor(parameter, kind)
            assert found.dtype == torch.float32 and torch.equal(found, expected), f"{kind} of {parameter}"
    assert any(tensor.any() for tensor in saved["exp_avg"].values())
    assert bool(saved["weight_steps"]) == (recipe == "per-weight steps")
    for layer, expected in saved["weight_steps"].items():
        found = reader.tensor(f"{layer}.weight", "weight_steps")
        assert found.dtype == torch.int16 and torch.equal(found.int(), expected), layer
        assert 0 < int(found.min()) < int(found.max()), "some weights were grown on the way"
    reader.check_all()


@pytest.mark.parametrize(("recipe", "source"), SOURCES, ids=str)
def test_weights_of_any_layout_load_without_an_engine(sources, checkpoints, recipe, source) -> None:
    name = source_name(recipe, source)
    weights, saved = load_model_weights(checkpoints[name]), sources[name][0]["saved"]["weights"]
    assert all(torch.equal(weights[parameter], expected) for parameter, expected in saved.items())
    assert torch.equal(weights["head.weight"], weights["embedding.tokens.weight"]) == (recipe != "blocks")


@pytest.mark.parametrize(("recipe", "source", "target"), CASES, ids=str)
def test_what_is_restored_is_what_was_saved(sources, resumed, recipe, source, target) -> None:
    saved = sources[source_name(recipe, source)][0]["saved"]
    for rank in resumed[case_name(recipe, source, target)]:
        for kind, tensors in saved.items():
            assert set(rank["restored"][kind]) == set(tensors)
            for name, expected in tensors.items():
                assert torch.equal(rank["restored"][kind][name], expected), f"{kind} of {name}"
        assert rank["state"] == [STOP, STOP * 8, 1 / 3]
        # The mean of 1, 2, ... over the data-parallel ranks that saved.
        assert rank["window_loss"] == 1 + (source.data - 1) / 2


@pytest.mark.parametrize(("recipe", "source", "target"), CASES, ids=str)
def test_the_run_goes_on_as_if_nothing_had_happened(sources, resumed, recipe, source, target) -> None:
    expected = sources[source_name(recipe, source)][0]["rest"]
    assert len({tuple(torch.cat(list(masks.values())).tolist()) for masks in expected["masks"]}) >= 4
    for rank in resumed[case_name(recipe, source, target)]:
        found = rank["rest"]
        if recipe == "bfloat16":
            torch.testing.assert_close(found["losses"], expected["losses"], rtol=BFLOAT16_LOSS_RTOL, atol=0)
            continue
        for step, (mine, theirs) in enumerate(zip(found["masks"], expected["masks"], strict=True), start=STOP):
            for name, bits in theirs.items():
                assert torch.equal(mine[name], bits), f"step {step}: topology of {name}"
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=LOSS_RTOL, atol=0)
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=NORM_RTOL, atol=0)


@pytest.fixture(scope="module")
def refused(checkpoints, tmp_path_factory) -> list[dict[str, str]]:
    """What two ranks say to the checkpoint of one, copied so that it may be damaged."""
    source = source_name("weights", Layout())
    folder = tmp_path_factory.mktemp("refused") / "checkpoints"
    shutil.copytree(checkpoints[source].parent, folder)
    cases = [("refused", Layout(data=2), overrides("weights"), folder)]
    return [rank["refused"] for rank in run_distributed(run_layouts, 2, "refuse", cases)]


def test_per_weight_steps_that_were_not_kept_are_asked_for_in_vain(refused) -> None:
    for messages in refused:
        for part in ("sparsity.per_weight_step_counts", "kept no per-weight steps", "must be false and 0"):
            assert part in messages["no per-weight steps"]


def test_a_flipped_bit_anywhere_is_named_and_never_trained_on(refused) -> None:
    flipped = [name for name in refused[0] if name.startswith(("flipped", "truncated"))]
    assert len(flipped) >= 24
    for name in flipped:
        file = name.split("/")[1]
        for messages in refused:
            assert "no good checkpoint" in messages[name] and file in messages[name], messages[name]
    assert all(messages["good again"] == "accepted" for messages in refused)
