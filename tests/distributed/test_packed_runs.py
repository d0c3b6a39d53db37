"""Runs with packed storage: a restart at any moment gives the same bits, also exactly where the capacity changes; any
layout and dense storage go on from its checkpoints, which are as small as the run; and every tool opens them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from extensions_setup import write_corpus
from harness import run_distributed
from packed_trainers import CHANGES, DENSE, PACKED, STEPS, train_all
from stacking_runs import lines, state

from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import load_model_weights
from megasparse.config.loader import load_config
from megasparse.conversion.inspection.verification import verify
from megasparse.conversion.sources import open_source, write_source
from megasparse.training.plan import make_plan

SPARSE = 8
"""Finished steps in the middle of the ultra-sparse phase."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))[:1]


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> Path:
    """All runs on one rank. A stop leaves a checkpoint of what was before the change that is due then."""
    packed = [*corpus, PACKED]

    def stop(step: int, storage: str = PACKED) -> list[str]:
        return [*corpus, storage, f"train.stop_after={step}"]

    folder = tmp_path_factory.mktemp("runs")
    started = [
        ("dense", [[*corpus, DENSE, "train.save_interval=2"]], None),
        ("undisturbed", [[*packed, "train.save_interval=2"]], None),
        ("changes", [*map(stop, CHANGES), packed], None),
        ("phases", [*map(stop, (2, 4, SPARSE, 12, 16)), packed], None),
        *((f"killed-{at}", [[*packed, "train.save_interval=3"], packed], at + 1) for at in CHANGES),
        ("storages", [stop(4), stop(7, DENSE), stop(9), stop(12, DENSE), packed], None),
    ]
    run_distributed(train_all, 1, folder, started, with_mesh=False, timeout=1800)
    return folder


def test_the_curve_is_that_of_dense_storage(runs) -> None:
    for theirs, mine in zip(lines(runs, "dense"), lines(runs, "undisturbed"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5) and mine["density"] == theirs["density"]
        assert mine["flops_algorithmic"] == theirs["flops_algorithmic"]
    expected, found = state(runs, "dense", STEPS), state(runs, "undisturbed", STEPS)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.allclose(tensor.double(), found[key].double(), atol=1e-5), key


@pytest.mark.parametrize("name", ["changes", "phases", *(f"killed-{at}" for at in CHANGES)])
def test_interrupted_runs_go_on_bit_for_bit(runs, name) -> None:
    assert lines(runs, name) == lines(runs, "undisturbed")
    expected, found = state(runs, "undisturbed", STEPS), state(runs, name, STEPS)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_run_goes_from_one_storage_to_the_other_and_back(runs) -> None:
    compare_curve(runs, "storages")


def compare_curve(folder: Path, name: str) -> None:
    """With that of the undisturbed run; masks are the same at the end."""
    for theirs, mine in zip(lines(folder, "undisturbed"), lines(folder, name), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5), theirs["step"]
    expected, found = state(folder, "undisturbed", STEPS), state(folder, name, STEPS)
    for key, tensor in expected.items():
        assert torch.allclose(tensor.double(), found[key].double(), atol=1e-5), key


LEGS = (
    (2, ["deepspeed.zero_stage=3", "train.stop_after=6"]),
    (1, ["deepspeed.zero_stage=0", "train.stop_after=9"]),
    # Without a topology update, which would balance the shards: until then they need more room than is planned.
    (2, ["parallel.tensor_parallel_size=2", "sparsity.balance_shards=true", "train.stop_after=10"]),
    (1, ["train.stop_after=12"]),
)


def test_other_layouts_go_on(runs, corpus) -> None:
    for ranks, words in LEGS:
        leg = [("layouts", [[*corpus, PACKED, *words]], None)]
        run_distributed(train_all, ranks, runs, leg, with_mesh=False, timeout=600)
    found = lines(runs, "layouts")
    assert [line["step"] for line in found] == list(range(1, 13))
    for theirs, mine in zip(lines(runs, "undisturbed"), found, strict=False):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5), theirs["step"]
    expected, saved = state(runs, "undisturbed", 12), state(runs, "layouts", 12)
    for key, tensor in expected.items():
        assert torch.allclose(tensor.double(), saved[key].double(), atol=1e-5), key


@pytest.mark.exhaustive
def test_a_damaged_checkpoint_of_another_capacity_is_passed_over(runs, corpus) -> None:
    words = [*corpus, PACKED]
    first = [("damaged", [[*words, "train.save_interval=3", "train.stop_after=6"]], None)]
    run_distributed(train_all, 1, runs, first, with_mesh=False, timeout=600)
    folder = runs / "damaged" / "checkpoints" / "step-00000006"
    file = folder / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    # In a tensor: sizes and header are as they were, so that it is found when it is read.
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    run_distributed(train_all, 1, runs, [("damaged", [words], None)], with_mesh=False, timeout=600)
    assert lines(runs, "damaged") == lines(runs, "undisturbed")


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_checkpoints_are_as_small_as_the_run(runs) -> None:
    name = f"checkpoints/step-{SPARSE:08d}"
    dense, packed = runs / "dense" / name, runs / "undisturbed" / name
    with Checkpoint(dense) as theirs, Checkpoint(packed) as mine:
        sparse = [parameter for parameter, saved in mine.index.parameters.items() if saved.grid is not None]
        entries = [
            sum(run.numel for file in saved.index.files.values() for p in sparse for run in file.runs[f"fp32/{p}"])
            for saved in (theirs, mine)
        ]
        assert len(sparse) == 8 and entries[1] / entries[0] == pytest.approx(0.2, abs=0.01)
        assert mine.shapes == theirs.shapes
        for key, tensor in state(runs, "dense", SPARSE).items():
            assert torch.allclose(tensor.double(), state(runs, "undisturbed", SPARSE)[key].double(), atol=1e-5), key
    assert size(packed) < 0.4 * size(dense)


def test_blocks_that_are_not_those_of_the_topology_are_refused(runs) -> None:
    with Checkpoint(runs / "undisturbed" / "checkpoints" / f"step-{SPARSE:08d}") as saved:
        saved.check_slots()
        name = "layers.1.mlp.up.weight"
        slots = saved.slots(name)
        moved = int(slots[0]) + 1 if int(slots[0]) + 1 not in slots else int(slots[0]) - 1
        slots[0] = moved
        with pytest.raises(CheckpointError, match="layers.1.mlp.up.weight does not hold the active blocks of layers.1"):
            saved.check_slots()


def test_tools_open_packed_checkpoints(runs, tmp_path) -> None:
    weights = [load_model_weights(runs / n / "checkpoints" / f"step-{SPARSE:08d}") for n in ("dense", "undisturbed")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    write_source(open_source(runs / "undisturbed", SPARSE), tmp_path / "model")
    assert verify(runs / "undisturbed") == []
    source = open_source(tmp_path / "model")
    for name in source.names:
        assert torch.equal(source.tensor(name), weights[1][name]), name


def test_the_plan_names_the_storage_of_all_steps(runs) -> None:
    plan = json.loads((runs / "undisturbed" / "plan.json").read_text())
    edges = [0, *CHANGES, STEPS]
    where = [f"storage in steps {first + 1} to {end}: " for first, end in zip(edges, edges[1:], strict=False)]
    assert [line[: len(start)] for line, start in zip(plan["methods"], where, strict=True)] == where
    assert plan["methods"][2] == where[2] + "8 of 8 sparse matrices packed, room for 78 of 384 blocks"
    assert plan["methods"][0] == where[0] + "dense" == plan["methods"][0]


@pytest.mark.parametrize(
    "words,message",
    [
        (["sparsity.block_size=1"], r"sparsity.block_size: 1, single weights, does not go with .*; must be 16, 32"),
        (["sparsity.groups=[{pattern: '*', block_size: 1}]"], r"sparsity.groups.0.block_size: 1"),
        (["sparsity.low_rank=2", "sparsity.fold_low_rank=true"], r"sparsity.fold_low_rank: true .*; must be false"),
        (["model.num_layers=4", "stacking.num_layers=2"], r"stacking.num_layers: 2 .*; must be unset"),
        (["train.precision=fp16"], r"train.precision: fp16 .*; must be fp32, bf16"),
        (["parallel.tensor_parallel_size=2"], r"sparsity.balance_shards: false .*; must be true"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(words, message) -> None:
    base = ["model.vocab_size=64", "model.hidden_size=64", "model.num_attention_heads=4", "sparsity.block_size=16"]
    with pytest.raises(ValueError, match=message):
        make_plan(load_config([], [*base, PACKED, *words]), 2, "cpu")


def test_a_benchmark_does_not_write_over_rows_of_other_settings(repository, monkeypatch, tmp_path) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    known_rows = importlib.import_module("packed_step").known_rows
    path = tmp_path / "packed_step.json"
    assert known_rows(path, {"tokens": 512}) == []
    path.write_text(json.dumps({"tokens": 512, "ranks": 2, "results": [{"density": 0.1}]}), encoding="utf-8")
    assert known_rows(path, {"tokens": 512, "ranks": 2}) == [{"density": 0.1}]
    with pytest.raises(ValueError, match="has tokens 512, and 1024 is asked for; must be the same, or"):
        known_rows(path, {"tokens": 1024, "ranks": 2})
