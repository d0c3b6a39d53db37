"""Linear layers: divided over tensor-parallel ranks by rows or by columns, plain or sparse on a grid of units.

A `column` layer (Megatron-LM's column-parallel) divides its outputs, a `row` layer its inputs; a pair of the two needs
one sum over the ranks in the forward pass and one in the backward pass. Each layer declares the division of each of its
parameters once (``ShardSpec``). With one rank both are ordinary layers.

A ``SparseLinear`` owns the mask that says which units of its shard of the weight are active. Whoever changes the mask
(the controller) also zeroes the inactive weights and then calls ``topology_changed``. Between two such calls the
forward pass asks the device nothing: while all units are active the layer is an ordinary linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.kernels import dense_products
from megasparse.kernels.block_sparse import (
    BlockIndex,
    build_index,
    choose,
    refresh_index,
    sparse_embedding,
    sparse_linear,
)
from megasparse.kernels.dense_products import dense_linear
from megasparse.layers.init import divided_parameter
from megasparse.parallel import ShardSpec, TensorParallel

Division = Literal["column", "row"]
Product = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(this rank's input, bias or None) -> this rank's output."""


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        name: full name of the layer in the model, such as `layers.3.attention.qkv`; keys the initial weights.
        in_features, out_features: widths of the whole layer.
        bias: has a bias, zero at the start.
        division: `column`: every rank computes its share of the outputs; `row`: it sees its share of the inputs.
        parts: sizes of the fused outputs of a column layer (query, key, value); empty: one.
        tensor_parallel: the ranks that share the layer.
        init_std: standard deviation of the initial weight.
        seed: seed of the run; None: weights are zeros, as they come from elsewhere.
        deferred: weights stay zero at first, see ``divided_parameter``.
        weight: a parameter to use instead of a new one, such as the one of a tied table; its values are kept.
        dense_kernel: of `dense_products.choose`.
    """

    low_rank = 0

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        division: Division = "column",
        parts: tuple[int, ...] = (),
        tensor_parallel: TensorParallel | None = None,
        init_std: float = 0.02,
        seed: int | None = 0,
        deferred: bool = False,
        weight: nn.Parameter | None = None,
        dense_kernel: str = "auto",
    ) -> None:
        super().__init__()
        self.dense_kernel = dense_kernel
        self._dense: dict[tuple[int, str, torch.dtype], str] = {}
        self.name, self.in_features, self.out_features, self.division = name, in_features, out_features, division
        self.tensor_parallel = tensor_parallel or TensorParallel()
        self.init_std, self.seed, self.deferred = init_std, seed, deferred
        self.drawn_as = name
        """The name that keys initial weights; a tied head has those of its table."""
        size = self.tensor_parallel.size
        dim = 0 if division == "column" else 1
        self.partition = ShardSpec((out_features, in_features), dim, size, parts)
        self._add_weight(weight)
        # The bias of a row layer is added to the sum, on every rank.
        bias_partition = ShardSpec((out_features,), 0, size, parts) if dim == 0 else ShardSpec((out_features,))
        self.bias = divided_parameter(bias_partition, self.tensor_parallel.rank) if bias else None

    def _add_weight(self, weight: nn.Parameter | None) -> None:
        self.weight = self._drawn("weight", self.partition) if weight is None else weight

    def _drawn(self, name: str, partition: ShardSpec, std: float | None = None) -> nn.Parameter:
        """A parameter with random initial values; std None: `init_std`."""
        rank, name, std = self.tensor_parallel.rank, f"{self.name}.{name}", self.init_std if std is None else std
        return divided_parameter(partition, rank, std=std, seed=self.seed, name=name, deferred=self.deferred)

    def forward(self, x: torch.Tensor, product: Product | None = None) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]; the divided side of the layer holds this rank's share.

        product: what takes the place of ``product``.
        """
        product = product or self.product
        if self.division == "column":
            return product(self.tensor_parallel.copy_to_region(x), self.bias)
        if self.tensor_parallel.size == 1:
            return product(x, self.bias)
        y = self.tensor_parallel.reduce_from_region(product(x, None))
        return y if self.bias is None else y + self.tensor_parallel.shared(self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x W^T + b with this rank's shard."""
        return dense_linear(x, self.weight, bias, kernel=self._dense_product(x))

    def _dense_product(self, x: torch.Tensor) -> str:
        """What computes dense products of an input, chosen once for each size of it."""
        if torch.compiler.is_compiling():
            return "torch"
        seen = x.numel() // x.shape[-1], x.device.type, x.dtype
        if seen not in self._dense:
            tokens, device, dtype = seen
            rows, columns = self.partition.local_shape
            self._dense[seen] = dense_products.choose(self.dense_kernel, device, dtype, tokens, (columns, rows))
        return self._dense[seen]

    def products(self, tokens: int) -> list[tuple[int, int, int]]:
        """Of matrices that compute a forward pass with this rank's shard of the whole matrix: rows, inner width,
        columns of each; 2 FLOPs for each triple of them."""
        columns, inner = self.partition.local_shape
        return [(tokens, inner, columns)]

    def product_parameters(self) -> list[torch.Tensor]:
        """What the product, with the bias, has a gradient for besides its input."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def whole_weight(self) -> torch.Tensor | None:
        """This rank's shard of the matrix, where it is stored and multiplied as such."""
        return self.weight

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` of this rank's shard: the layer used as an embedding table. Returns [*ids.shape, in_features]."""
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.in_features} -> {self.out_features}, {self.division}, bias={self.bias is not None}"


class SparseLinear(Linear):
    """A linear layer whose weight lies on a grid of `block_size` x `block_size` blocks (single weights where
    `block_size` is 1).

    Blocks lie whole on one rank. With `low_rank` = r > 0 a dense low-rank branch is added: y += (x A^T) B^T with
    `side_in` = A [r, in] and `side_out` = B [out, r]; B is zero at the start, so the path is silent until it has
    learned something. `kernel` and `break_even` are those of ``choose``; `settings` those of ``Linear``.

    Attributes:
        mask: bool, the grid of this rank's shard, True where the unit is active; a buffer outside of the state dict.
        grid: how the grid of the whole layer, [out / unit, in / unit], is divided.
        index: lists of the active units, for the kernels; None while all are active. Kept by `topology_changed`.
        backend: name of the kernel that computes the layer, chosen once for each size of input and again after each
            change of the topology; that for the last input. None before the first forward pass.
        collect_dense_gradient: while True the backward pass returns the gradient of inactive units too.

    Raises:
        ValueError: `block_size` does not divide both widths of every rank's shard.
    """

    mask: torch.Tensor

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        low_rank: int = 0,
        kernel: str = "auto",
        break_even: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(name, in_features, out_features, **settings)
        check_block_size(name, self.partition, block_size)
        self.block_size, self.low_rank, self.kernel, self.break_even = block_size, low_rank, kernel, break_even
        self.index: BlockIndex | None = None
        self.backend: str | None = None
        self._input: tuple[int, str, torch.dtype] | None = None
        self._backends: dict[tuple[int, str, torch.dtype], str] = {}
        self.collect_dense_gradient = False
        self.grid = self.partition.blocks(block_size)
        self.register_buffer("mask", torch.ones(self.grid.local_shape, dtype=torch.bool), persistent=False)
        if low_rank:
            self._add_side_path(low_rank)

    def _add_side_path(self, low_rank: int) -> None:
        """The thin matrix on the divided side of the layer is divided, the other one is replicated."""
        size = self.tensor_parallel.size
        inner = ShardSpec((low_rank, self.in_features), 1 if self.division == "row" else None, size)
        outer = ShardSpec((self.out_features, low_rank), 0, size, self.partition.parts)
        if self.division == "row":
            outer = ShardSpec(outer.shape)
        self.side_in = self._drawn("side_in", inner)
        self.side_out = divided_parameter(outer, self.tensor_parallel.rank)

    def leave_side_path_out(self) -> None:
        """The low-rank branch has been folded into the weight: it is not computed any more, its parameters stay."""
        self.low_rank = 0

    def topology_changed(self, num_active: int | None = None) -> None:
        """Must be called after every change of `mask`. The count of active units, where the caller knows it, saves a
        round trip to the device. Where it stays the same the lists of `index` are changed in place, and otherwise made
        anew.
        """
        if num_active is None:
            num_active = int(self.mask.sum())
        self.index = self._lists(num_active)
        self._backends.clear()
        self._choose_backend()

    def _lists(self, num_active: int) -> BlockIndex | None:
        return None if num_active == self.mask.numel() else self._lists_of(num_active)

    def _lists_of(self, num_active: int, slot_blocks: torch.Tensor | None = None) -> BlockIndex:
        held = self.index
        if (
            held is not None
            and (held.mask is self.mask and held.slot_blocks is slot_blocks)
            and held.num_active == num_active
        ):
            refresh_index(held)
            return held
        return build_index(self.mask, self.block_size, num_active, slot_blocks)

    def _choose_backend(self) -> None:
        if self._input is None:
            return
        known = self._backends.get(self._input)
        self.backend = known or ("dense" if self.index is None else self._fastest(*self._input, self.index))
        # A traced program may not change a dictionary; it chooses while it is traced.
        if not torch.compiler.is_compiling():
            self._backends[self._input] = self.backend

    def _fastest(self, tokens: int, device: str, dtype: torch.dtype, index: BlockIndex) -> str:
        rows, columns = self.partition.local_shape
        place = self.kernel, device, dtype, self.block_size, tokens
        sizes = index.density, (columns, rows)
        return choose(*place, *sizes, break_even=self.break_even, is_packed=index.is_packed)

    def forward(self, x: torch.Tensor, product: Product | None = None) -> torch.Tensor:
        y = super().forward(x, product)
        return y + self._side(x) if self.low_rank else y

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        kernel = self.backend_for(x)
        place = self.index, self.collect_dense_gradient, kernel
        return sparse_linear(x, self.weight, bias, *place, dense=self._dense_for(x, kernel))

    def _dense_for(self, x: torch.Tensor, kernel: str) -> str:
        """What computes dense products, where there are any."""
        return self._dense_product(x) if kernel == "dense" or self.collect_dense_gradient else "torch"

    def backend_for(self, x: torch.Tensor) -> str:
        """Name of the kernel that computes the layer for an input of as many tokens as x, of its device and dtype."""
        seen = x.numel() // x.shape[-1], x.device.type, x.dtype
        if seen != self._input:
            self._input = seen
            self._choose_backend()
        assert self.backend is not None
        return self.backend

    def _side(self, x: torch.Tensor) -> torch.Tensor:
        """The low-rank branch: its thin middle crosses between the ranks instead of the wide ends."""
        shared = self.tensor_parallel.shared
        if self.division == "column":
            return F.linear(self.tensor_parallel.copy_to_region(F.linear(x, shared(self.side_in))), self.side_out)
        return F.linear(self.tensor_parallel.reduce_from_region(F.linear(x, self.side_in)), shared(self.side_out))

    def whole_weight(self) -> torch.Tensor | None:
        return self.weight if self.index is None else None

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return sparse_embedding(ids, self.weight, self.index, self.collect_dense_gradient)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}, low_rank={self.low_rank}"


def check_block_size(name: str, partition: ShardSpec, block_size: int) -> None:
    """Raise ValueError unless blocks of side `block_size` fill every shard of the weight of layer `name`."""
    shares = [size // (partition.size if dim == partition.dim else 1) for dim, size in enumerate(partition.shape)]
    if partition.dim is not None and partition.parts:
        shares[partition.dim] = gcd(*(part // partition.size for part in partition.parts))
    common = gcd(*shares)
    if block_size >= 1 and common % block_size == 0:
        return
    allowed = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    ranks = f" on each of {partition.size} tensor-parallel ranks" if partition.is_divided else ""
    raise ValueError(
        f"block_size: {block_size} does not divide the widths of layer {name} "
        f"({partition.shape[0]} x {partition.shape[1]}){ranks}; must be {allowed}"
    )
