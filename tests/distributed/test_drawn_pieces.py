"""Ranks draw the initial weights that they hold, and hardly more."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from engine_runs import Layout, divided, run_config
from harness import run_distributed

from megasparse.layers.init import BLOCK, _Draws
from megasparse.parallel import Mesh, shard_spec_of
from megasparse.training.build_engine import build_engine


def draw(mesh: Mesh, layout: Layout, overrides: list[str]) -> dict[str, int]:
    """Numbers that a rank draws, and may draw: what it holds, whole rows of what is divided by columns."""
    own, config, drawn = divided(mesh, layout.tensor), run_config(overrides, layout), []
    normal = _Draws._normal

    def counting(draws: _Draws, position: int, count: int) -> torch.Tensor:
        drawn.append(count)
        return normal(draws, position, count)

    with patch.object(_Draws, "_normal", counting):
        _, engine = build_engine(config, config.model.vocab_size, own)
    allowed = 0
    for parameter in engine.model.parameters():
        spec, held = shard_spec_of(parameter), getattr(parameter, "ds_tensor", parameter).numel()
        rows = (spec.size if spec.dim == 1 else 1) * held
        # A block at either end, of each fused part; two rows where a piece begins and ends within one.
        allowed += rows + 2 * BLOCK * max(len(spec.parts), 1) + (2 * spec.shape[1] if spec.dim == 1 else 0)
    return {"drawn": sum(drawn), "allowed": allowed, "all": sum(p.numel() for p in engine.model.parameters())}


@pytest.mark.parametrize(
    "layout",
    [Layout(2, zero=3), Layout(1, 2, zero=1), Layout(2, 2, zero=3), Layout(zero=0)],
)
def test_a_rank_draws_what_it_holds(layout: Layout) -> None:
    for found in run_distributed(draw, layout.world_size, layout, []):
        assert 0 < found["drawn"] <= found["allowed"], found
