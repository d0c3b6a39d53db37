"""Switching in runs: moving neurons changes no function, every layout has the same run, and stops leave no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import Layout
from harness import run_distributed
from test_method_runs import train
from trainer_runs import run_trainers, write_documents

from megasparse.parallel import Mesh

SETTINGS = [
    "model.hidden_size=32", "model.num_layers=3", "model.activation=relu2", "sparsity.algorithm=dense",
    "train.steps=10", "sparsity.block_size=8",
]  # fmt: skip
# Clustered in steps 2 and 7; mixtures in 3 to 5, 8 and 9; the last step is dense.
SWITCHING = [
    "switching.clusters=8", "switching.active=4", "switching.shards=2", "switching.threshold=0", "switching.interval=2",
    "switching.period=3",
]  # fmt: skip


def train_cases(mesh: Mesh, cases: list[tuple[Layout, list[str]]]) -> list[dict]:
    return [train(mesh, layout, [*SETTINGS, *words]) for layout, words in cases]


def check_layouts(layouts: list[Layout], more: list[tuple[Layout, list[str]]]) -> None:
    one = Layout(1, 1, 0, 1)
    alone, dense = run_distributed(train_cases, 1, [(one, SWITCHING), (one, [])])[0]
    # Loss and norm of each step.
    assert alone["curve"][:4] == dense["curve"][:4] and alone["curve"][4] != dense["curve"][4]
    cases = [*((layout, SWITCHING) for layout in layouts), *more]
    for other, case in zip(run_distributed(train_cases, 2, cases)[0], cases, strict=True):
        assert other["curve"] == pytest.approx(alone["curve"], rel=2e-5), case
        for kind in ("weights", "exp_avg"):
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(
                    other[kind][name], tensor, rtol=1e-3, atol=2e-5, msg=f"{case}: {kind} {name}"
                )


def test_every_layout_has_the_same_run() -> None:
    check_layouts([Layout(2, 1, 2, 2), Layout(2, 1, 3, 1), Layout(1, 2, 0, 1)], [])


@pytest.mark.exhaustive
def test_further_layouts_have_the_same_run() -> None:
    shared_tokens = (Layout(1, 2, 1, 1), [*SWITCHING, "parallel.sequence_parallel=true"])
    recomputed = (Layout(2, 1, 3, 1), [*SWITCHING, "train.activation_recomputation=true"])
    check_layouts([Layout(2, 1, 1, 1), Layout(2, 1, 3, 2), Layout(1, 2, 0, 2)], [shared_tokens, recomputed])


def test_moved_neurons_are_the_same_model() -> None:
    """With all clusters active a run that moves its neurons has the losses of one that does not, also later on, when
    moments decide: they were moved too."""
    one, all_active = Layout(1, 1, 0, 1), [*SWITCHING, "switching.active=8", "model.bias=true"]
    moved, dense = run_distributed(train_cases, 1, [(one, all_active), (one, ["model.bias=true"])])[0]
    # The sums over neurons have another order: 1e-6 in float32, and Adam carries it on.
    assert moved["curve"] == pytest.approx(dense["curve"], rel=2e-4)
    name = "layers.0.mlp.up.weight"
    here, there = moved["weights"][name], dense["weights"][name]
    assert (here - there).abs().max() > 1e-3
    distances = torch.cdist(here, there)
    nearest = distances.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(here)))
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for part, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1)):
            key = f"layers.0.mlp.{part}"
            expected = dense[kind][key].index_select(dim, nearest)
            torch.testing.assert_close(moved[kind][key], expected, rtol=1e-2, atol=1e-4, msg=f"{kind} {key}")


def test_interrupted_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped among the mixtures, and between two clusterings."""
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, *SWITCHING, data, "train.log_interval=1", "train.valid_interval=4"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, Layout(1, 1, 0, 1), []), ("stopped", words, Layout(1, 1, 0, 1), [3, 6])]
    found = run_distributed(run_trainers, 1, cases, tmp_path)[0]
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    shares = [line["mlp_share"] for line in found["straight"]]
    assert shares == [1.0, 1.0, 0.5, 0.5, 0.5, 1.0, 1.0, 0.5, 0.5, 1.0]
