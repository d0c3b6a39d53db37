"""Runs that grow in depth: a restart at any moment gives the same bits, whatever it interrupts; any layout the same
curve; and what they cost is what the plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from extensions_setup import write_corpus
from harness import run_distributed
from stacking_runs import GROWTH, disturb, lines, state, watch_growth

from megasparse.checkpoint.reader import Checkpoint

SMALL, WHOLE, STEPS = 2, 4, 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))[:1]


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_distributed(watch_growth, 1, folder, "undisturbed", corpus, with_mesh=False)[0]


def test_each_layer_begins_as_a_copy_and_the_optimizer_anew(undisturbed) -> None:
    folder, found = undisturbed
    _, grown = found["starts"]
    small = state(folder, "undisturbed", GROWTH)
    assert small["exp_avg/layers.0.mlp.up.weight"].any(), "the small model has moments that must not go on"
    names = [name for name in grown["weights"] if name.startswith("layers.")]
    assert {name.split(".")[1] for name in names} == {"0", "1", "2", "3"}
    for name, weight in grown["weights"].items():
        number = name.split(".")[1] if name in names else ""
        original = name.replace(f"layers.{number}.", f"layers.{int(number) % SMALL}.") if number else name
        assert torch.equal(weight, small[f"fp32/{original}"].view(-1)), name
        assert torch.equal(weight, grown["weights"][original]), name
    for layer, mask in grown["masks"].items():
        number = int(layer.split(".")[1])
        assert torch.equal(mask, grown["masks"][layer.replace(f".{number}.", f".{number % SMALL}.", 1)]), layer
        assert 0 < int(mask.sum()) < mask.numel(), "the run is sparse where it grows"
    assert grown["moments"] == 0
    assert found["updates"] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]]
    assert found["is_gone"], "the small model stays in memory"


def test_one_curve_with_the_loss_of_the_copy_at_its_first_step(undisturbed) -> None:
    folder, _ = undisturbed
    found = lines(folder, "undisturbed")
    assert [(line["step"], line["num_layers"]) for line in found] == [(3, 2), (5, 2), (6, 4), (9, 4), (12, 4)]
    assert [line["tokens"] for line in found] == [128 * line["step"] for line in found]
    with Checkpoint(folder / "undisturbed" / "checkpoints" / f"step-{STEPS:08d}") as saved:
        assert saved.facts.train_state["lines"]["metrics"] == len(found), "a restart would miss lines"
    assert found[-1]["loss"] < found[0]["loss"] and [bool(line.get("val_loss")) for line in found] == [
        *(False, False, True, False, True)
    ]


def test_the_ledger_is_the_plan(undisturbed) -> None:
    folder, _ = undisturbed
    plan, last = json.loads((folder / "undisturbed" / "plan.json").read_text()), lines(folder, "undisturbed")[-1]
    assert plan["methods"] == [f"{SMALL} layers until step {GROWTH}, then copied to {WHOLE}"]
    for kind in ("dense", "algorithmic", "executed"):
        assert last[f"flops_{kind}"] == pytest.approx(plan["flops"][kind], rel=1e-12), kind
    assert [(stage["num_layers"], stage["end_step"]) for stage in plan["stages"]] == [(SMALL, GROWTH), (WHOLE, STEPS)]


def test_interrupted_runs_go_on_bit_for_bit(undisturbed, corpus) -> None:
    folder, _ = undisturbed
    run_distributed(disturb, 1, folder, corpus, with_mesh=False)
    expected = state(folder, "undisturbed", STEPS)
    for name in ("stopped", "killed", "damaged"):
        assert lines(folder, name) == lines(folder, "undisturbed"), name
        found = state(folder, name, STEPS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert [line["num_layers"] for line in lines(folder, "longer")] == [2, 2, 4, 4]
    begun, first = lines(folder, "begun"), lines(folder, "undisturbed")[0]
    assert [line["num_layers"] for line in begun] == [2, 2, 4] and begun[0]["loss"] < first["loss"] - 0.1


LAYOUTS = {"data": [], "tensor": ["parallel.tensor_parallel_size=2", "deepspeed.zero_stage=3"]}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_have_the_same_curve(undisturbed, corpus, name) -> None:
    folder, _ = undisturbed
    words = [*corpus, *LAYOUTS[name]]
    found = run_distributed(watch_growth, 2, folder, name, words, with_mesh=False)
    assert all(rank["is_gone"] for rank in found), "the small model stays in memory"
    for theirs, mine in zip(lines(folder, "undisturbed"), lines(folder, name), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), theirs["step"]
        assert mine["flops_algorithmic"] == theirs["flops_algorithmic"]
