"""`train.micro_batch_size_by_phase`: other micro-batches in some phases, and the same samples, losses and weights, with
dense and packed storage, at the ZeRO stages, and over restarts in each phase."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import Layout
from extensions_setup import write_corpus
from harness import run_distributed
from packed_runs import WORDS
from stacking_runs import state
from trainer_runs import run_trainers

STEPS = 24
BY_PHASE = "train.micro_batch_size_by_phase={ultra_sparse: 4, restoration: 1}"
SIZES = {"warm_up": 2, "ultra_sparse": 4, "restoration": 1, "dense": 2}
STOPS = [3, 9, 15, 21]
"""Finished steps, one in each phase."""
LAYOUTS = {
    "stage 1": (Layout(data=2, zero=1, accumulation=2), []),
    "stage 2, offload": (Layout(data=2, zero=2, accumulation=2), ["deepspeed.offload_optimizer=cpu"]),
    "stage 3": (Layout(data=2, zero=3, accumulation=2), []),
}


def train(mesh, corpus: list[str], folder: Path) -> dict[str, list[dict]]:
    """On one rank, or on two, each with micro-batches of two where the phase does not say otherwise."""
    words, dense, packed = (
        [*corpus, *WORDS, "train.log_interval=1"],
        "sparsity.storage=dense",
        "sparsity.storage=packed",
    )
    alone = Layout(accumulation=4)
    if mesh.world_size == 2:
        cases = [(name, [*words, BY_PHASE, packed, *more], layout, []) for name, (layout, more) in LAYOUTS.items()]
    else:
        cases = [
            ("alike", [*words, dense], alone, []),
            ("dense", [*words, BY_PHASE, dense], alone, []),
            ("packed", [*words, BY_PHASE, packed], alone, []),
            ("stopped", [*words, BY_PHASE, packed], alone, STOPS),
        ]
    return run_trainers(mesh, cases, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list[dict]]:
    corpus = write_corpus(folder)[:1]
    return {**run_distributed(train, 1, corpus, folder)[0], **run_distributed(train, 2, corpus, folder)[0]}


@pytest.mark.parametrize("name", ["dense", "packed", *LAYOUTS])
def test_losses_and_weights_are_those_of_equal_micro_batches(runs, folder, name) -> None:
    expected, found = runs["alike"], runs[name]
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for theirs, mine in zip(expected, found, strict=True):
        assert mine["micro_batch_size"] == SIZES[mine["phase"]]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5), theirs["step"]
        assert mine["tokens"] == theirs["tokens"] and mine["flops_algorithmic"] == theirs["flops_algorithmic"]
    assert {line["micro_batch_size"] for line in found} == {1, 2, 4} and "micro_batch_size" not in expected[0]
    weights = state(folder, "alike", STEPS)
    for key, tensor in state(folder, name, STEPS).items():
        assert torch.allclose(weights[key].double(), tensor.double(), atol=1e-5), key


def test_a_run_goes_on_in_each_phase_bit_for_bit(runs, folder) -> None:
    assert runs["stopped"] == runs["packed"]
    expected, found = state(folder, "packed", STEPS), state(folder, "stopped", STEPS)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_bytes_sent_fall_while_micro_batches_are_large_and_few_weights_are_active(runs) -> None:
    """Of ZeRO stage 3, which sends with every micro-batch."""
    lines = runs["stage 3"]
    sums = [sum(line[f"bytes_{kind}"] for kind in ("reduced", "gathered")) for line in lines]
    steps = [after - before for before, after in zip([0.0, *sums], sums, strict=False)]
    dense, sparsest = steps[-1], min(steps)
    assert steps[0] == dense and lines[steps.index(sparsest)]["phase"] == "ultra_sparse"
    # Half as many micro-batches of a fifth of the sparse weights; embeddings and norms stay.
    assert sparsest < 0.25 * dense < max(steps) / 1.9
