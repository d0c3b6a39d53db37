"""A resume between two lines of metrics: the next line has the means of an uninterrupted run, of the parts too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_runs import Layout, run_config
from harness import run_distributed
from trainer_runs import train_run, write_documents

from megasparse.objectives.objective import NextTokenCrossEntropy, ObjectiveResult

SETTINGS = [
    "model.hidden_size=32",
    "model.seq_length=16",
    "sparsity.algorithm=dense",
    "train.steps=8",
    "train.log_interval=4",
]
STOP = 6
# Of sums over the same samples in another order.
LOSS_RTOL = 1e-6


class TwoParts(NextTokenCrossEntropy):
    """The loss is the sum of two parts, which are other numbers on every rank."""

    def __call__(self, model, batch) -> ObjectiveResult:
        loss, _ = super().__call__(model, batch)
        return ObjectiveResult(loss, {"second": 0.75 * loss.detach(), "first": 0.25 * loss.detach()})


def legs(mesh, folder: Path, ranks: int) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics of a run that is not stopped, of one that is, and of what goes on from another layout's."""
    given = [*SETTINGS, f"data.train=[{{path: {folder / 'documents'}}}]"]

    def leg(name: str, *more: str) -> list[dict[str, Any]]:
        config = run_config([*given, *more], Layout(data=ranks))
        return train_run(mesh, config, folder / name, objective=TwoParts())

    found = {"straight": leg(f"straight on {ranks}"), "stopped": leg(f"stopped on {ranks}", f"train.stop_after={STOP}")}
    mesh.barrier()
    if mesh.is_first:
        shutil.copytree(folder / f"stopped on {ranks}", folder / f"kept from {ranks}")
    mesh.barrier()
    found["resumed"] = leg(f"stopped on {ranks}")
    other = folder / f"kept from {3 - ranks}"
    return {**found, "from another layout": leg(other.name) if other.is_dir() else []}


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[int, dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("runs")
    write_documents(folder / "documents", (8, 40), 4000)
    return {ranks: run_distributed(legs, ranks, folder, ranks)[0] for ranks in (2, 1)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_line_after_a_resume_is_that_of_an_uninterrupted_run(lines, ranks) -> None:
    straight = lines[ranks]["straight"]
    assert [line["step"] for line in straight] == [4, 8]
    assert [*lines[ranks]["stopped"], *lines[ranks]["resumed"]] == straight


def test_another_number_of_ranks_goes_on_from_the_means_of_those_before(lines) -> None:
    straight, (line,) = lines[1]["straight"], lines[1]["from another layout"]
    for name in ("loss", "first", "second"):
        assert line[name] == pytest.approx(straight[-1][name], rel=LOSS_RTOL), name
