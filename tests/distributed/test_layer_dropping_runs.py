"""Layer dropping beside mixed sparsity: the same run in every ZeRO stage and division, and bit for bit over stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import Layout, collected_state, divided, make_batches, run_config
from harness import run_distributed
from trainer_runs import run_trainers, write_documents

from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.callback import Step

SETTINGS = [
    "model.hidden_size=32", "model.num_layers=3", "sparsity.block_size=8", "layer_dropping.theta=0.4",
    "layer_dropping.gamma=1", "train.steps=12", "sparsity.algorithm=rigl", "sparsity.density=0.4",
]  # fmt: skip
ONE_RANK = [Layout(1, 1, 0, 1), Layout(1, 1, 1, 2)]
TWO_RANKS = [Layout(2, 1, 1, 1), Layout(2, 1, 2, 2), Layout(2, 1, 3, 1), Layout(2, 1, 3, 2), Layout(1, 2, 0, 1)]
SHARED_TOKENS = Layout(1, 2, 1, 1)


def train(mesh: Mesh, layout: Layout, words: list[str]) -> dict:
    """A run by hand: loss and norm of each step, topologies and state at the end."""
    config, own = run_config([*SETTINGS, *words], layout), divided(mesh, layout.tensor)
    methods, engine = build_engine(config, config.model.vocab_size, own)
    size, losses, kept = config.train.micro_batch_size, [], []
    for index, batch in enumerate(make_batches(config)):
        step, loss_sum = Step(index), torch.zeros((), dtype=torch.float64)
        for method in methods:
            method.begin_step(step)
        for micro in range(engine.accumulation_steps):
            start = (micro * own.data_parallel.size + own.data_parallel.rank) * size
            part = batch[start : start + size]
            loss = engine.forward(part[:, :-1], part[:, 1:])
            engine.backward(loss)
            loss_sum += loss.detach().double() / engine.accumulation_steps
        norm = engine.gradient_norm()
        for method in methods:
            method.after_backward(step)
        engine.step(config.optimizer.lr, skip_update=step.skip_update)
        losses += [float(own.data_parallel.sum_(loss_sum) / own.data_parallel.size), norm]
        kept.append(step.metrics["kept_branches"])
    return {"curve": losses, "kept": kept, "masks": methods[0].state(), **collected_state(own, engine)}


def train_all(mesh: Mesh, cases: list[tuple[Layout, list[str]]]) -> list[dict]:
    return [train(mesh, layout, words) for layout, words in cases]


def test_every_layout_has_the_same_curve_topology_and_weights() -> None:
    alone, *found = run_distributed(train_all, 1, [(layout, []) for layout in ONE_RANK])[0]
    two = [(layout, []) for layout in TWO_RANKS] + [(SHARED_TOKENS, ["parallel.sequence_parallel=true"])]
    found += run_distributed(train_all, 2, two)[0]
    assert min(alone["kept"]) < 0.6 and max(alone["kept"]) == 1.0
    for other, case in zip(found, [*ONE_RANK[1:], *two], strict=True):
        assert other["kept"] == alone["kept"], case
        assert other["curve"] == pytest.approx(alone["curve"], rel=2e-5), case
        for name, bits in alone["masks"].items():
            assert torch.equal(bits, other["masks"][name]), (case, name)
        for kind in ("weights", "exp_avg"):
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(
                    other[kind][name], tensor, rtol=1e-3, atol=2e-5, msg=f"{case}: {kind} {name}"
                )


def test_interrupted_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, data, "train.log_interval=1", "train.valid_interval=4"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, ONE_RANK[0], []), ("stopped", words, ONE_RANK[0], [3, 7])]
    found = run_distributed(run_trainers, 1, cases, tmp_path)[0]
    assert [line["loss"] for line in found["stopped"]] == [line["loss"] for line in found["straight"]]
    assert repr(found["stopped"][-1]) == repr(found["straight"][-1])
    # The ledger counts what was kept: with all branches 1, with none what head and dense gradients cost.
    lines = found["straight"]
    assert {line["kept_branches"] for line in lines} > {1.0} and lines[-1]["flops_executed"] < lines[-1]["flops_dense"]
