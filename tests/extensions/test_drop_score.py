"""A drop score added from outside the package decides a topology update."""

from __future__ import annotations

import pytest
import torch
from fake_layers import BASE, FakeLayer, FakeState

from megasparse.config.loader import load_config
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.scores import DROP_SCORES, LARGEST, DropScore

NAME = "layers.0.mlp.up"


@pytest.mark.parametrize("name", DROP_SCORES)
def test_the_scores_of_the_table_are_finite_at_the_ends_of_the_numbers(name) -> None:
    ends = torch.tensor([0.0, 1e-45, 1.0, LARGEST])
    weight, gradient = (grid.flatten() for grid in torch.meshgrid(ends, ends, indexing="ij"))
    scores = DROP_SCORES[name].score(-weight, gradient, 10.0)
    assert scores.dtype == torch.float32 and torch.isfinite(scores).all() and (scores >= 0).all()


def test_the_lowest_of_a_new_score_go(monkeypatch) -> None:
    # The heaviest weights are worth the least: the reverse of magnitude.
    monkeypatch.setitem(DROP_SCORES, "lightness", DropScore(lambda w, g, factor: 1 / (1 + w.abs()), False))
    config = load_config([], [*BASE, "sparsity.algorithm=set", "sparsity.block_size=1", "sparsity.density=0.5"])
    config = config.model_copy(update={"sparsity": config.sparsity.model_copy(update={"drop_score": "lightness"})})
    layers = {NAME: FakeLayer(64, 32, 1, seed=5)}
    controller = Controller(config, layers)
    controller.start_topologies()
    state = FakeState(layers)
    before, weight = layers[NAME].mask.clone(), state.state[NAME][0].abs().view(64, 32).clone()
    decision = controller.begin_step(4)
    assert decision.changes_topology and not decision.dense_gradient_layers
    controller.update_topology(state)
    (counts,) = decision.counts[NAME]
    heaviest = weight[before].sort(descending=True).values[: counts.active - counts.keep]
    # All that went are among the heaviest; some of these may have been grown again at random.
    gone = weight[before & ~layers[NAME].mask]
    assert len(gone) > 0 and torch.isin(gone, heaviest).all()
