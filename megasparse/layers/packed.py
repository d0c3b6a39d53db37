"""A sparse linear layer whose parameter is its active blocks: packed storage.

While the density is low, gradient, optimizer state, traffic and checkpoints are then as small as what is active,
without anybody's doing: they follow the parameter. ``PackedLinear`` is a ``SparseLinear`` in all else, and comes from
the factory in its place (``SparseSpec.capacity``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megasparse.kernels.block_sparse import BlockIndex, pack, packed_embedding, packed_linear, unpack
from megasparse.layers.init import divided_parameter
from megasparse.layers.linear import SparseLinear
from megasparse.parallel import ShardSpec, TensorParallel


class PackedLinear(SparseLinear):
    """A sparse linear layer with `capacity` slots for blocks on each rank.

    It begins with empty slots. Whoever fills them sets `weight`, `slot_blocks` and `mask` and calls
    `topology_changed`, before the first forward pass and after every change of the two. `settings` are those of
    ``SparseLinear``.

    Attributes:
        weight: [capacity, block_size, block_size]: slot s holds block `slot_blocks[s]` of this rank's shard. It is
            declared as [capacity * ranks, block_size, block_size], divided along dim 0; `partition` and `grid` are
            those of the matrix [out, in] all the same.
        slot_blocks: int32 [capacity]: flat number, row * columns + column, of the block on this rank's grid; -1: the
            slot is empty and its weights are exactly 0. A buffer outside of the state dict, as `mask` is.
        mask: bool, this rank's grid, True where a slot holds the block.
        dense_gradient_ready: while `collect_dense_gradient`, called in the backward pass, once per backward pass of
            the layer, with dy^T x [out, in] of this rank's shard in the dtype of x. For a head it is summed over the
            chunks of tokens, for a tied one over head and table. The gradient of `weight` is the packed one always.

    Raises:
        ValueError: `block_size` is 1 or does not divide both widths of every rank's shard, or `capacity` is out of
            range.
    """

    slot_blocks: torch.Tensor

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        capacity: int,
        tensor_parallel: TensorParallel | None = None,
        **settings: Any,
    ) -> None:
        ranks = tensor_parallel or TensorParallel()
        check_capacity(name, capacity, block_size, in_features * out_features // ranks.size)
        stored = ShardSpec((capacity * ranks.size, block_size, block_size), 0, ranks.size)
        settings |= {"tensor_parallel": ranks, "weight": divided_parameter(stored, ranks.rank)}
        super().__init__(name, in_features, out_features, block_size=block_size, **settings)
        self.capacity = capacity
        self.mask.zero_()
        slots = torch.full((capacity,), -1, dtype=torch.int32)
        self.register_buffer("slot_blocks", slots, persistent=False)
        self.dense_gradient_ready: Callable[[torch.Tensor], None] | None = None
        self._probe: torch.Tensor | None = None

    def dense_weight(self) -> torch.Tensor:
        """[out, in] of this rank's shard, exactly zero outside of active blocks: a copy, without a gradient."""
        rows, columns = self.mask.shape
        return unpack(self.weight.detach(), self.slot_blocks, (rows, columns))

    def initial_blocks(self) -> torch.Tensor:
        """What the matrix begins with, of the blocks in the slots: float32 [capacity, block_size, block_size]."""
        name, rank = f"{self.drawn_as}.weight", self.tensor_parallel.rank
        drawn = divided_parameter(self.partition, rank, std=self.init_std, seed=self.seed, name=name).detach()
        return pack(drawn, self.slot_blocks.to(drawn.device), self.block_size)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernel = self.backend_for(x)
        place = self._active(), kernel, self._wanted_probe()
        return packed_linear(x, self.weight, bias, *place, self._dense_for(x, kernel))

    def product_parameters(self) -> list[torch.Tensor]:
        probe = self._wanted_probe()
        return super().product_parameters() + ([] if probe is None else [probe])

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return packed_embedding(ids, self.weight, self._active(), self._wanted_probe())

    def _lists(self, num_active: int) -> BlockIndex | None:
        return self._lists_of(num_active, self.slot_blocks)

    def _active(self) -> BlockIndex:
        assert self.index is not None, f"{self.name}: topology_changed was not called"
        return self.index

    def _wanted_probe(self) -> torch.Tensor | None:
        """The tensor whose gradient is the dense one: the same until a backward pass has come to it, so that autograd
        sums what all uses of the layer give. None where nobody wants it."""
        if not (self.collect_dense_gradient and torch.is_grad_enabled()):
            return None
        if self._probe is None:
            # Without memory of its own. A fresh one for each backward pass is the first to be met after the layer's
            # product, so that the dense gradient of one layer is gone before that of the next one is made.
            anchor = torch.zeros((), dtype=self.weight.dtype, device=self.weight.device, requires_grad=True)
            self._probe = _Probe.apply(anchor, self)
        return self._probe

    def _dense_gradient(self, gradient: torch.Tensor) -> None:
        self._probe = None
        assert self.dense_gradient_ready is not None, f"{self.name}: nobody takes the dense gradient"
        self.dense_gradient_ready(gradient)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, capacity={self.capacity}"


class _Probe(torch.autograd.Function):
    """(anchor, layer) -> zeros [out, in] of the layer's shard, which hand their gradient to the layer.

    The anchor makes autograd come here; its own gradient is none.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, layer: PackedLinear) -> torch.Tensor:
        ctx.layer = layer
        return anchor.new_zeros(()).expand(layer.partition.local_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None]:
        ctx.layer._dense_gradient(gradient)
        return None, None


def check_capacity(name: str, capacity: int, block_size: int, weights: int) -> None:
    """Raise ValueError unless layer `name` can be packed in so many slots. weights: of each rank's shard."""
    if block_size == 1:
        raise ValueError(
            f"block_size: 1 in layer {name} cannot be packed: each single weight would need an int32 beside it that "
            "says where it lies, and kernels multiply blocks; it must be 16, 32, 64 or 128, or the storage dense"
        )
    most = weights // max(block_size, 1) ** 2
    if not 1 <= capacity <= most:
        raise ValueError(f"capacity: {capacity} is out of range for layer {name}; must be 1 to {most} blocks per rank")
