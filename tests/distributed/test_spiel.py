"""SpIEL: a fixed number of entries, exchanged alike in every ZeRO stage and over stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_runs import MODEL, check_entries, check_resumed, run_cases
from engine_runs import Layout
from harness import run_distributed
from initial_runs import write_folder

STOPS = (1, 4, 7)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("spiel") / "base"
    write_folder(folder, [*MODEL, "model.vocab_size=97"])
    settings = ["spiel.density=0.02", "spiel.interval=4", "spiel.selection_steps=2", "optimizer.lr=0.01"]
    return [*settings, "model.vocab_size=97", f"train.init_from={folder}"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, dict]:
    cases = [("stopped", words, Layout(1, 1, 0, 1))]
    return run_distributed(run_cases, 1, cases, tmp_path_factory.mktemp("alone"), STOPS)[0]


def test_as_many_entries_as_asked_for_are_trained_and_no_other(alone, words) -> None:
    check_entries(alone["stopped"], Path(words[-1].partition("=")[2]), 0.02)
    assert alone["stopped"]["bytes"] == alone["stopped"]["trained"] * (4 + 4 + 2)


def test_it_resumes_bit_for_bit_within_a_selection_too(alone) -> None:
    check_resumed(alone["stopped"], alone["stopped again"])


def test_ranks_and_stages_exchange_the_same_entries(alone, words, tmp_path) -> None:
    # Candidates come from the first micro-batch of all ranks: the whole batch, as of one rank alone.
    layouts = [Layout(2, 1, 1, 1), Layout(2, 1, 2, 1), Layout(2, 1, 3, 1)]
    cases = [(str(layout), words, layout) for layout in layouts]
    for name, result in run_distributed(run_cases, 2, cases, tmp_path, STOPS)[0].items():
        assert result["curve"] == pytest.approx(alone["stopped"]["curve"], rel=1e-4), name
        for layer, numbers in alone["stopped"]["numbers"].items():
            assert torch.equal(numbers, result["numbers"][layer]), (name, layer)
            wanted = alone["stopped"]["values"][layer]
            torch.testing.assert_close(result["values"][layer], wanted, rtol=1e-3, atol=1e-4)
