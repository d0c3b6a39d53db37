"""Which blocks Sparse Matrix Tuning chooses: a planted one, against plain scores, and in what numbers."""

from __future__ import annotations

import pytest
import torch

from megasparse.config.loader import load_config
from megasparse.layers.delta import DeltaLinear, freeze
from megasparse.methods.sparse_matrix_tuning import block_budget, block_scores, choose_blocks

SCORES = {
    "mean_of_magnitudes": lambda block: block.abs().mean(),
    "magnitude_of_mean": lambda block: block.mean().abs(),
    "norm": lambda block: block.norm(),
}


def layers_of(**shapes: tuple[int, int]) -> dict[str, DeltaLinear]:
    found = {name.replace("_", "."): shape for name, shape in shapes.items()}
    return {name: DeltaLinear(name, shape[1], shape[0], unit=16, bias=False) for name, shape in found.items()}


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_those_of_plain_blocks_smaller_ones_at_the_edges_too(score: str) -> None:
    layer, gradient = DeltaLinear("layer", 40, 50, unit=16, bias=False), torch.randn(50, 40)
    rows, columns = range(0, 50, 16), range(0, 40, 16)
    expected = [SCORES[score](gradient[r : r + 16, c : c + 16]) for r in rows for c in columns]
    torch.testing.assert_close(block_scores(gradient, layer, score), torch.stack(expected))


@pytest.mark.parametrize("allocation", ["kind", "matrix"])
def test_each_pool_has_its_share(allocation: str) -> None:
    config = load_config([], ["smt.density=0.25", "smt.block_size=16", f"smt.allocation={allocation}"])
    layers = layers_of(l_attention_qkv=(96, 32), l_attention_output=(32, 32), l_mlp_up=(72, 32))
    pools = block_budget(layers, config)
    # 12 and 4 whole blocks of attention; of 9 x 16 x 16 entries of the MLP a quarter is 2.25 blocks.
    assert [count for _, count in pools] == ([4, 2] if allocation == "kind" else [3, 1, 2])
    scores = {name: torch.rand(layer.num_units) for name, layer in layers.items()}
    chosen = choose_blocks(scores, pools)
    for names, count in pools:
        inside = torch.cat([scores[name][chosen[name]] for name in names])
        outside = torch.cat([scores[name][~chosen[name]] for name in names])
        assert len(inside) == count and inside.min() > outside.max()


def test_a_planted_block_is_found_and_learned() -> None:
    """Only block 4 of the second layer differs from the target: nothing else is chosen, and it becomes the target's."""
    torch.manual_seed(0)
    layers = layers_of(a_mlp_up=(48, 48), b_mlp_up=(48, 48))
    targets, sums = {}, {}
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.weight, std=0.1)
        freeze(layer)
        targets[name] = layer.weight.clone()
    targets["b.mlp.up"][16:32, 16:32] += 0.1 * torch.randn(16, 16)
    for name, layer in layers.items():
        sums[name] = torch.zeros(48, 48)
        layer.dense_gradient_ready = sums[name].add_
        layer.delta = torch.zeros(256, requires_grad=True)
    x = torch.randn(512, 48)

    def loss() -> torch.Tensor:
        # Noise in the target, so that no gradient is 0.
        torch.manual_seed(1)
        wanted = {name: x @ target.t() for name, target in targets.items()}
        errors = [layer(x) - wanted[name] - 0.05 * torch.randn(512, 48) for name, layer in layers.items()]
        return sum(error.square().mean() for error in errors)

    loss().backward()
    scores = {name: block_scores(total, layers[name], "mean_of_magnitudes") for name, total in sums.items()}
    chosen = choose_blocks(scores, [(list(layers), 1)])
    assert not chosen["a.mlp.up"].any() and chosen["b.mlp.up"].nonzero().tolist() == [[4]]
    layer = layers["b.mlp.up"]
    layer.dense_gradient_ready, layers["a.mlp.up"].dense_gradient_ready = None, None
    layer.choose(torch.tensor([4]))
    before, frozen = float(loss().detach()), layer.weight.clone()
    optimizer = torch.optim.Adam([layer.delta], lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    left = (layer.weight - targets["b.mlp.up"])[16:32, 16:32].norm() / (frozen - targets["b.mlp.up"]).norm()
    assert float(loss().detach()) < before and left < 0.2
    outside = torch.ones(48, 48, dtype=torch.bool)
    outside[16:32, 16:32] = False
    assert torch.equal(layer.weight[outside], frozen[outside])
