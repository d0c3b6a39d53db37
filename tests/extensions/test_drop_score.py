"""A drop score added from outside the package decides a topology update."""

from __future__ import annotations

import torch
from fake_layers import BASE, FakeLayer, FakeState

from megasparse.config.loader import load_config
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.scores import DROP_SCORES, DropScore

NAME = "layers.0.mlp.up"


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
