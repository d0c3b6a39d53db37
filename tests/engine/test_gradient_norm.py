"""The global gradient norm against a plain one: pieces, replicas, loss scale, dense gradients, what is not finite."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from fake_layers import FakeLayer

from megasparse.engine.gradient_norm import global_gradient_norm
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.state import StateFragment

START, NUMEL = 5, 300


def norm(layer: FakeLayer, gradient: torch.Tensor, scale: float = 1.0, losses: float = 0.0) -> float:
    """Of one rank that holds a piece of a sparse matrix."""
    alone = CommunicationGroup()
    fragment = StateFragment(START, torch.zeros(NUMEL), gradient, gradient_scale=scale)
    model = SimpleNamespace(
        sparse_layers=lambda: {"layer": layer}, named_parameters=lambda: [("layer.weight", layer.weight)]
    )
    access = SimpleNamespace(shard=alone, fragments=lambda: {"layer.weight": fragment})
    return float(global_gradient_norm(access, model, Mesh(torch.device("cpu"), alone, alone, alone, alone), losses)[0])


@pytest.mark.parametrize("block_size", [1, 4])
def test_inactive_weights_count_only_where_they_are_not_finite(block_size: int) -> None:
    layer, gradient = FakeLayer(32, 16, block_size, 0), torch.randn(NUMEL)
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.3)
    active = layer.mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1).view(-1)[START:][:NUMEL]
    assert norm(layer, gradient) == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert norm(layer, gradient * 1024, scale=1024) == pytest.approx(float(gradient.norm()), rel=1e-6)
    layer.collect_dense_gradient = True
    assert norm(layer, gradient) == pytest.approx(float(gradient[active].norm()), rel=1e-6)
    for place in (int(active.nonzero()[0]), int((~active).nonzero()[0])):
        for value in (math.nan, math.inf, -math.inf):
            wrong = gradient.clone()
            wrong[place] = value
            assert not math.isfinite(norm(layer, wrong))


def test_a_loss_that_is_not_finite_is_in_the_norm() -> None:
    layer, gradient = FakeLayer(32, 16, 4, 0), torch.randn(NUMEL)
    assert norm(layer, gradient, losses=torch.tensor(7.0)) == norm(layer, gradient)
    assert math.isnan(norm(layer, gradient, losses=torch.tensor(math.inf)))


def test_bfloat16_gradients_are_added_up_in_float32() -> None:
    gradient = torch.ones(NUMEL, dtype=torch.bfloat16)
    assert norm(FakeLayer(32, 16, 4, 0), gradient) == pytest.approx(math.sqrt(NUMEL), rel=1e-6)
