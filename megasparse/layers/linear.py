"""Linear layers: plain, and sparse on a grid of units.

A ``SparseLinear`` owns the mask that says which units of its weight live. Whoever changes the mask (the controller)
also zeroes the dead weights and then calls ``topology_changed``. Between two such calls the forward pass asks the
device nothing: while all units live the layer is an ordinary linear layer.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import nn

from megasparse.kernels.block_sparse import sparse_embedding, sparse_linear
from megasparse.layers.init import normal_


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        name: full name of the layer in the model, such as `layers.3.attention.qkv`; keys the initial weights.
        in_features, out_features: widths.
        bias: has a bias, zero at the start.
        init_std: standard deviation of the initial weight.
        seed: seed of the run.
        weight: an existing [out_features, in_features] parameter to share; its values are kept.
    """

    low_rank = 0

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init_std: float = 0.02,
        seed: int = 0,
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, in_features, out_features
        if weight is None:
            weight = nn.Parameter(torch.empty(out_features, in_features))
            normal_(weight, init_std, seed, f"{name}.weight")
        assert weight.shape == (out_features, in_features), f"{name}: shared weight is {tuple(weight.shape)}"
        self.weight = weight
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` of the weight: the layer used as an embedding table. Returns [*ids.shape, in_features]."""
        return F.embedding(ids, self.weight)

    def extra_repr(self) -> str:
        return f"{self.name}, {self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class SparseLinear(Linear):
    """A linear layer whose weight lives on a grid of `unit` x `unit` blocks (single weights where `unit` is 1).

    With `low_rank` = r > 0 a thin dense side path is added: y += (x A^T) B^T with `side_in` = A [r, in] and `side_out`
    = B [out, r]; B is zero at the start, so the path is silent until it has learned something.

    Attributes:
        mask: bool [out / unit, in / unit], True where the unit lives; a buffer that is not part of the state dict.
        is_dense: all units live. Kept by `topology_changed`.
        collect_dense_gradient: while True the backward pass returns the gradient of dead units too.

    Raises:
        ValueError: `unit` does not divide both widths.
    """

    mask: torch.Tensor

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        unit: int,
        low_rank: int = 0,
        kernel: str = "auto",
        init_std: float = 0.02,
        seed: int = 0,
        weight: nn.Parameter | None = None,
    ) -> None:
        check_unit(name, in_features, out_features, unit)
        super().__init__(name, in_features, out_features, bias=bias, init_std=init_std, seed=seed, weight=weight)
        self.unit, self.low_rank, self.kernel = unit, low_rank, kernel
        self.is_dense = True
        self.collect_dense_gradient = False
        grid = torch.ones(out_features // unit, in_features // unit, dtype=torch.bool)
        self.register_buffer("mask", grid, persistent=False)
        if low_rank:
            self.side_in = nn.Parameter(torch.empty(low_rank, in_features))
            self.side_out = nn.Parameter(torch.zeros(out_features, low_rank))
            normal_(self.side_in, init_std, seed, f"{name}.side_in")

    def topology_changed(self, is_dense: bool | None = None) -> None:
        """Must be called after every change of `mask`. `is_dense` saves a device sync where the caller knows it."""
        self.is_dense = bool(self.mask.all()) if is_dense is None else is_dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = sparse_linear(
            x, self.weight, self.bias, self._live_mask(), self.unit, self.collect_dense_gradient, self.kernel
        )
        if self.low_rank:
            y = y + F.linear(F.linear(x, self.side_in), self.side_out)
        return y

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        return sparse_embedding(ids, self.weight, self._live_mask(), self.unit, self.collect_dense_gradient)

    def _live_mask(self) -> torch.Tensor | None:
        return None if self.is_dense else self.mask

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, unit={self.unit}, low_rank={self.low_rank}"


def check_unit(name: str, in_features: int, out_features: int, unit: int) -> None:
    """Raise ValueError unless `unit` divides both widths of the layer `name`."""
    if unit >= 1 and in_features % unit == 0 and out_features % unit == 0:
        return
    common = gcd(in_features, out_features)
    legal = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
    raise ValueError(
        f"unit: {unit} does not divide the widths of layer {name} ({out_features} x {in_features}); "
        f"legal values: {legal}"
    )
