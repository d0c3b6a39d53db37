"""Dense gradients of layers with packed storage, in the steps whose topology update grows blocks by them.

    gradients = DenseGradients(layers, mesh.data_parallel, owners)      # owners: ranks that divide the state
    ...                                                # backward passes: each layer hands its gradient over
    share = gradients.shares["layers.0.mlp.up"]        # this rank's blocks of it, averaged
    gradients.clear()

The parameter of such a layer is its active blocks, and so is the gradient that ZeRO reduces. The gradient of all blocks
exists for one layer at a time: as soon as a backward pass has made it, it is averaged over the data-parallel ranks, and
each owner keeps its share of the blocks. With several micro-batches it is averaged in each of them, since whole float32
sums of all layers would take more memory than everything that packed storage saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import pack
from megasparse.sparsity.state import Ranks


class PackedLayer(Protocol):
    """What is asked of a layer with packed storage."""

    mask: Tensor
    block_size: int
    dense_gradient_ready: Callable[[Tensor], None] | None


@dataclass
class BlockShare:
    """Blocks [first, first + n) of the averaged dense gradient of a layer's shard."""

    first: int
    blocks: Tensor
    """float32 [n, block_size, block_size]."""
    owners: Ranks
    """Ranks whose shares make up the shard."""

    def square_sums(self, grid: tuple[int, int]) -> Tensor:
        """Sums of squares by block, float64 on the grid of the shard; 0 for blocks of other owners."""
        sums = torch.zeros(grid[0] * grid[1], dtype=torch.float64, device=self.blocks.device)
        of_own = self.blocks.flatten(1).to(torch.float64).square().sum(dim=1)
        sums[self.first : self.first + len(of_own)] = of_own
        return sums.view(grid)

    def gather(self, numbers: Tensor) -> Tensor:
        """Some blocks, int64 [m], the same on all owners, which all call it: float32 [m, block_size, block_size]."""
        own = (numbers >= self.first) & (numbers < self.first + len(self.blocks))
        found = self.blocks.new_zeros(len(numbers), *self.blocks.shape[1:])
        found[own] = self.blocks[numbers[own] - self.first]
        return self.owners.sum_(found)


class DenseGradients:
    """Takes the dense gradients of `layers` as their backward passes make them.

    replicas: ranks over which gradients are averaged. owners: those of them that each keep a share; a single one where
    every rank keeps everything (ZeRO stage 0).
    """

    def __init__(self, layers: Mapping[str, PackedLayer], replicas: Ranks, owners: Ranks) -> None:
        self.shares: dict[str, BlockShare] = {}
        """By layer; empty but between the backward passes and the optimizer step of a topology update."""
        self._replicas, self._owners = replicas, owners
        for name, layer in layers.items():
            layer.dense_gradient_ready = partial(self._add, name, layer.mask.numel(), layer.block_size)

    def clear(self) -> None:
        """Let go of everything; the step is over."""
        self.shares.clear()

    def total(self) -> Tensor | float:
        """The sum of all entries of this rank's shares; not finite where one of them is not."""
        return sum((share.blocks.sum(dtype=torch.float64) for share in self.shares.values()), 0.0)

    @torch.no_grad()
    def _add(self, name: str, num_blocks: int, block_size: int, gradient: Tensor) -> None:
        """gradient: [rows, columns] of the shard, of one micro-batch of this rank."""
        mean = self._replicas.sum_(gradient.to(torch.float32, copy=True)).div_(self._replicas.size)
        owners = self._owners
        first, end = (num_blocks * rank // owners.size for rank in (owners.rank, owners.rank + 1))
        blocks = pack(mean, torch.arange(first, end, device=mean.device), block_size)
        if name in self.shares:
            self.shares[name].blocks += blocks
        else:
            self.shares[name] = BlockShare(first, blocks, owners)
