"""Frozen linear layers in which some entries are trained: what Sparse Matrix Tuning and SpIEL have in common.

    layer = DeltaLinear(name, inputs, outputs, unit=64, bias=True)     # from the factory (``LayerFactory.tuned``)
    adapter = Adapter(layers, total)                                   # one parameter, which the layers share out
    adapter.hand_out()                                                 # before each forward pass
    layer.choose(numbers)                                              # which units are trained from here on

A layer computes with W + D, where D is zero outside of the chosen units. Values of D are a piece of the adapter's one
parameter, so that optimizer, gradients, traffic and checkpoints are as small as it is, and layers may have any number
of units each. The sum is put into the weight in place, one dense product follows, and the backward pass computes the
gradient of the chosen entries alone, layer by layer. W itself is a frozen buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megasparse.layers.linear import Linear
from megasparse.parallel import ShardSpec

GATHERED_ELEMENTS = 2**24
"""Of inputs and output gradients that are put side by side for the gradient of blocks, at once; 64 MiB in float32."""


class DeltaLinear(Linear):
    """A linear layer of which units of `unit` x `unit` entries are trained; where that does not divide a width, the
    last ones are smaller. Not divided over tensor-parallel ranks. `settings` are those of ``Linear``.

    Attributes:
        numbers: int64 [n], flat numbers of the chosen units, row * columns + column on a grid that covers the matrix,
            rising; None: nothing is chosen yet.
        base: float32 [n, unit, unit], the frozen values at these places.
        delta: [n unit^2], what is added to them; set before each forward pass.
        dense_gradient_ready: while set, called in each backward pass with dy^T x [out, in] in the dtype of x.
    """

    def __init__(self, name: str, in_features: int, out_features: int, *, unit: int, **settings: Any) -> None:
        super().__init__(name, in_features, out_features, **settings)
        assert self.tensor_parallel.size == 1, f"{name}: units are chosen over whole matrices"
        self.unit = unit
        self.grid = -(-out_features // unit), -(-in_features // unit)
        self.numbers: Tensor | None = None
        self.base = torch.empty(0)
        self.delta = torch.empty(0)
        self.dense_gradient_ready: Callable[[Tensor], None] | None = None

    @property
    def num_units(self) -> int:
        return self.grid[0] * self.grid[1]

    @torch.no_grad()
    def choose(self, numbers: Tensor) -> None:
        """Train these units from here on. Those before take their frozen values again."""
        self.unmerge()
        self.numbers = numbers.to(self.weight.device, torch.int64)
        at, inside = self.entries()
        self.base = self.weight.view(-1)[at].to(torch.float32) * inside

    @torch.no_grad()
    def merge(self, values: Tensor) -> None:
        """Put base + values [n unit^2] into the weight, rounded once to its dtype."""
        if self.numbers is None:
            return
        self._write(self.base + values.view(self.base.shape).to(torch.float32))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the frozen values back, bit for bit."""
        if self.numbers is not None:
            self._write(self.base)

    def _write(self, values: Tensor) -> None:
        """Put values of the chosen units [n, unit, unit] into the weight."""
        at, inside = self.entries()
        if self.out_features % self.unit or self.in_features % self.unit:
            # The host waits for a device here, to learn how many they are.
            at, values = at[inside], values[inside]
        self.weight.view(-1)[at] = values.to(self.weight.dtype)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Flat places in the weight of all entries of the chosen units, int64 [n, unit, unit], and whether they are
        inside of it; places outside are 0."""
        assert self.numbers is not None
        return unit_entries(self.numbers, self.unit, (self.out_features, self.in_features))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.merge(self.delta.detach())
        return _FrozenProduct.apply(x, self.delta, bias, self)

    def delta_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Gradient of `delta`, from the layer's input [N, in] and the gradient of its output [N, out]."""
        if self.dense_gradient_ready is not None:
            dense = dy.t() @ x
            self.dense_gradient_ready(dense)
            if self.numbers is None:
                return torch.zeros_like(self.delta)
            at, inside = self.entries()
            return (dense.view(-1)[at] * inside).view(-1)
        if self.numbers is None or self.numbers.numel() == 0:
            return torch.zeros_like(self.delta)
        if self.unit == 1:
            # Single columns would be gathered from all over; a product is faster, and is gone before the next layer's.
            return (dy.t() @ x).view(-1)[self.numbers]
        return block_gradients(x, dy, self.numbers, self.unit).view(-1)


def unit_entries(numbers: Tensor, unit: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As ``DeltaLinear.entries``, for units of a matrix of this shape."""
    rows, columns = shape
    across = -(-columns // unit)
    inner = torch.arange(unit, device=numbers.device)
    row = (numbers // across * unit).view(-1, 1, 1) + inner.view(1, -1, 1)
    column = (numbers % across * unit).view(-1, 1, 1) + inner.view(1, 1, -1)
    inside = (row < rows) & (column < columns)
    return (row * columns + column).masked_fill(~inside, 0), inside


def block_gradients(x: Tensor, dy: Tensor, numbers: Tensor, unit: int) -> Tensor:
    """Blocks of dy^T x [n, unit, unit], and no other entry of it; exactly 0 where a block hangs over the edge."""
    x_NCb, dy_NRb = (F.pad(t, (0, -t.shape[1] % unit)).unflatten(1, (-1, unit)) for t in (x, dy))
    rows, columns = numbers // x_NCb.shape[1], numbers % x_NCb.shape[1]
    at_once = max(GATHERED_ELEMENTS // (x.shape[0] * unit), 1)
    parts = [
        torch.bmm(dy_NRb[:, r].permute(1, 2, 0), x_NCb[:, c].transpose(0, 1))
        for r, c in zip(rows.split(at_once), columns.split(at_once), strict=True)
    ]
    return torch.cat(parts)


class _FrozenProduct(torch.autograd.Function):
    """(x [..., in], delta, bias or None, layer) -> x W^T + b. The layer's weight must hold what delta says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None, layer: DeltaLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return F.linear(x, layer.weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        dx = dy @ layer.weight if ctx.needs_input_grad[0] else None
        gradient = layer.delta_gradient(x.flatten(0, -2), dy.flatten(0, -2)) if ctx.needs_input_grad[1] else None
        return dx, gradient, None, None


class Adapter(nn.Module):
    """The one trained parameter, `values` [total], and how it is shared out.

    layers: by name, in the order of their pieces. total: entries; until units are chosen the first layer has them all,
    with a gradient of zero.
    """

    def __init__(self, layers: Mapping[str, DeltaLinear], total: int) -> None:
        super().__init__()
        # In a tuple the layers do not become submodules, and keep their one place and name.
        self._layers = (dict(layers),)
        device = next(iter(layers.values())).weight.device
        self.values = nn.Parameter(torch.zeros(total, device=device))
        ShardSpec((total,)).declare(self.values)

    def forward(self) -> Tensor:
        """A copy, for at ZeRO stage 3 the parameter itself is whole in here alone."""
        return self.values.clone()

    def sizes(self) -> dict[str, int]:
        """Entries of each layer."""
        (layers,) = self._layers
        sizes = {
            name: 0 if layer.numbers is None else layer.numbers.numel() * layer.unit**2
            for name, layer in layers.items()
        }
        if not any(sizes.values()):
            sizes[next(iter(layers))] = self.values.ds_numel if hasattr(self.values, "ds_numel") else len(self.values)
        return sizes

    def hand_out(self) -> None:
        """Give each layer its piece."""
        (layers,) = self._layers
        pieces = self().split(list(self.sizes().values()))
        for layer, piece in zip(layers.values(), pieces, strict=True):
            layer.delta = piece


def freeze(model: nn.Module) -> None:
    """Make every parameter a buffer outside of the state dict; shared ones stay shared."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                frozen = parameter.__dict__.setdefault("frozen", parameter.detach())
                module.register_buffer(name, frozen, persistent=False)


def frozen_buffers(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where the frozen tensors are, by the name of the parameter that each of them was."""
    found: dict[int, tuple[str, list[tuple[nn.Module, str]]]] = {}
    for prefix, module in model.named_modules():
        for attribute, tensor in module._buffers.items():
            if tensor is not None and attribute in ("weight", "bias"):
                name = f"{prefix}.{attribute}"
                found.setdefault(id(tensor), (name, []))[1].append((module, attribute))
    return dict(found.values())
