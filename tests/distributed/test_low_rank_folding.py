"""Low-rank branches folded into their matrices: what the model computes stays, in every ZeRO stage and division; the
branch stays zero and costs nothing more; runs that are interrupted before and after go on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_runs import Layout, divided, make_batches, model_weight, run_config
from harness import run_distributed
from trainer_runs import run_trainers, write_documents

from megasparse.config.loader import ConfigError, load_config
from megasparse.methods.callback import Step
from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.plan import make_plan

SETTINGS = [
    "model.hidden_size=32", "sparsity.block_size=8", "sparsity.low_rank=4", "sparsity.fold_low_rank=true",
    "sparsity.points=[[0,0.3],[0.5,0.3],[0.6,1],[1,1]]", "train.steps=12",
]  # fmt: skip
# Dense by the schedule from step 7.2 on, so at the topology update of step 9.
FOLDED_IN = 9
ONE_RANK = [Layout(1, 1, 0, 1)]
TWO_RANKS = [Layout(2, 1, 1, 1), Layout(2, 1, 2, 1), Layout(2, 1, 3, 1), Layout(1, 2, 0, 1)]


def train(mesh: Mesh, layout: Layout) -> dict[str, list[float]]:
    """Losses of all steps, and of one batch just before and after the fold, in a step of learning rate 0."""
    config, own = run_config(SETTINGS, layout), divided(mesh, layout.tensor)
    methods, engine = build_engine(config, config.model.vocab_size, own)
    batches, result = make_batches(config), {"losses": [], "around": []}
    size = config.train.micro_batch_size
    layers = engine.model.sparse_layers().values()

    def look() -> None:
        result["around"].append(float(engine.evaluate(batches[0][:size, :-1], batches[0][:size, 1:])))

    for index, batch in enumerate(batches):
        step, part = Step(index), batch[own.data_parallel.rank * size :][:size]
        for method in methods:
            method.begin_step(step)
        assert step.work.low_rank_branches == (index <= FOLDED_IN) == all(layer.low_rank for layer in layers)
        loss = engine.forward(part[:, :-1], part[:, 1:])
        engine.backward(loss)
        engine.gradient_norm()
        if index == FOLDED_IN:
            changes = [float((model_weight(layer.side_out) @ model_weight(layer.side_in)).norm()) for layer in layers]
            assert min(changes) > 1e-4
            look()
        for method in methods:
            method.after_backward(step)
        engine.step(0.0 if index == FOLDED_IN else config.optimizer.lr)
        if index == FOLDED_IN:
            look()
        if index >= FOLDED_IN:
            assert not any(model_weight(side).any() for layer in layers for side in (layer.side_in, layer.side_out))
        result["losses"].append(float(own.data_parallel.sum_(loss.detach().double()) / own.data_parallel.size))
    return result


def train_all(mesh: Mesh, layouts: list[Layout]) -> list[dict[str, list[float]]]:
    return [train(mesh, layout) for layout in layouts]


def test_the_model_computes_the_same_before_and_after_in_every_layout() -> None:
    alone = run_distributed(train_all, 1, ONE_RANK)[0][0]
    for found in [alone, *run_distributed(train_all, 2, TWO_RANKS)[0]]:
        before, after = found["around"]
        assert after == pytest.approx(before, rel=1e-6)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert alone["losses"][-1] < alone["losses"][0]


def test_interrupted_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    words = [*SETTINGS, data, "train.log_interval=1", "train.valid_interval=0"]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    cases = [("straight", words, ONE_RANK[0], []), ("stopped", words, ONE_RANK[0], [8, 9, 10, 11])]
    found = run_distributed(run_trainers, 1, cases, tmp_path)[0]
    assert repr(found["stopped"]) == repr(found["straight"])


def test_the_plan_counts_the_branch_until_it_is_folded() -> None:
    def cost(*words: str) -> float:
        return make_plan(run_config([*SETTINGS, *words]), 1)["flops"]["algorithmic"]

    with_branch, folded = cost("sparsity.fold_low_rank=false"), cost()
    without = cost("sparsity.fold_low_rank=false", "sparsity.low_rank=0")
    assert (with_branch - folded) / (with_branch - without) == pytest.approx((12 - FOLDED_IN - 1) / 12)


def test_a_run_that_never_becomes_dense_is_refused() -> None:
    config = load_config([], ["sparsity.algorithm=set", "sparsity.low_rank=2", "sparsity.fold_low_rank=true",
                              "model.vocab_size=64"])  # fmt: skip
    with pytest.raises(ConfigError, match="fold_low_rank: true, but by the schedule of sparsity.algorithm set"):
        make_plan(config, 1)


def test_logits_stay_within_a_millionth() -> None:
    assert run_distributed(logits_around, 1)[0] < 1e-6


def logits_around(mesh: Mesh) -> float:
    """Largest difference of logits, over the largest logit, before and after the fold of random branches."""
    config = run_config(SETTINGS, ONE_RANK[0])
    methods, engine = build_engine(config, config.model.vocab_size, mesh)
    batch = make_batches(config)[0]
    engine.backward(engine.forward(batch[:, :-1], batch[:, 1:]))
    with torch.no_grad():
        for layer in engine.model.sparse_layers().values():
            layer.side_out.normal_(0, 0.1)
        before = engine.model(batch[:, :-1])
        methods[1].after_backward(Step(FOLDED_IN))
        after = engine.model(batch[:, :-1])
    return float((after - before).abs().max() / before.abs().max())
