"""Dense gradients of packed layers: averaged over replicas and summed over micro-batches, each owner with its share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from shards import SimulatedRanks, on_shards

from megasparse.kernels.block_sparse import pack
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.dense_gradients import DenseGradients

GRID, SIDE = (3, 5), 4


def gradient(rank: int, micro: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro)
    return torch.randn(GRID[0] * SIDE, GRID[1] * SIDE, generator=generator)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_shares_are_the_mean(num_ranks, divided) -> None:
    mean = sum(gradient(rank, 0) + gradient(rank, 1) for rank in range(num_ranks)) / num_ranks
    blocks = pack(mean, torch.arange(15), SIDE)
    wanted = torch.tensor([14, 0, 7])

    def work(rank: int, ranks: SimulatedRanks) -> None:
        layer = SimpleNamespace(mask=torch.ones(GRID, dtype=torch.bool), block_size=SIDE, dense_gradient_ready=None)
        gradients = DenseGradients({"layer": layer}, ranks, ranks if divided else CommunicationGroup())
        for micro in range(2):
            mine = gradient(rank, micro)
            kept = mine.clone()
            layer.dense_gradient_ready(mine)
            assert torch.equal(mine, kept), "the gradient is not ours to change"
        share = gradients.shares["layer"]
        assert len(share.blocks) == (15 * (rank + 1) // num_ranks - 15 * rank // num_ranks if divided else 15)
        sums = share.square_sums(GRID)
        whole = ranks.sum_(sums.clone()) if divided else sums
        assert torch.allclose(whole.view(-1), blocks.double().square().sum(dim=(1, 2)), rtol=1e-5)
        assert torch.allclose(share.gather(wanted), blocks[wanted], rtol=1e-5, atol=1e-6)
        assert share.gather(wanted[:0]).shape == (0, SIDE, SIDE)
        assert torch.isfinite(torch.as_tensor(gradients.total()))
        layer.dense_gradient_ready(torch.full_like(mine, torch.inf) if rank == 0 else mine)
        assert not torch.isfinite(torch.as_tensor(gradients.total()))
        gradients.clear()
        assert not gradients.shares and gradients.total() == 0

    on_shards(num_ranks, work)
