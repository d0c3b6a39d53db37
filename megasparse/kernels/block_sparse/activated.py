"""Two sparse linear layers with an activation between them, f(x U^T + b) D^T + c, by the Triton kernels.

    y = activated.pair(x, Blocks(weight, bias, index), Blocks(weight, bias, index), "gelu")

The activation is computed where its input is made: the product of the first layer writes z = x U^T + b and f(z), the
input gradient of the second one dz = f'(z) (dy D). Otherwise f is a kernel of its own, which reads z and writes f(z),
and in the backward pass reads z and the gradient of f(z) and writes dz. Numbers are rounded where torch's operators
round them but for the gradient of f(z), which f'(z) multiplies in float32.

Names: N tokens, I and O outer widths, F width inside.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megasparse.kernels.block_sparse import gpu
from megasparse.kernels.block_sparse.dense import bias_gradient
from megasparse.kernels.block_sparse.index import BlockIndex

NAMES = ("gelu", "relu2")
"""Activations that the kernels know, by their names in ``utils.activations``."""


class Blocks(NamedTuple):
    """A layer in either storage, as ``sparse_linear`` and ``packed_linear`` take it."""

    weight: Tensor
    bias: Tensor | None
    lists: BlockIndex


def pair(x: Tensor, first: Blocks, second: Blocks, activation: str) -> Tensor:
    """[..., in] -> [..., out]. activation: one of NAMES. The gradient of each weight is as it is stored, exactly zero
    outside of active blocks."""
    z_NF, h_NF = _Activated.apply(x.reshape(-1, x.shape[-1]), *first, activation)
    y_NO = _OfActivated.apply(z_NF, h_NF, *second, activation)
    return y_NO.view(*x.shape[:-1], y_NO.shape[1])


class _Activated(Function):
    """(x_NI, weight, bias, index, activation) -> z_NF = x W^T + b, and f(z), which has no gradient of its own."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex, activation: str
    ) -> tuple[Tensor, Tensor]:
        z_NF, h_NF = gpu.activated_forward(x_NI, weight, bias, index, activation)
        ctx.save_for_backward(x_NI, weight)
        ctx.index, ctx.version = index, index.mask._version
        ctx.mark_non_differentiable(h_NF)
        ctx.set_materialize_grads(False)
        return z_NF, h_NF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x_NI, weight = ctx.saved_tensors
        _check_topology(ctx)
        return *gpu.backward(dz, x_NI, weight, ctx.index, ctx.needs_input_grad[:3]), None, None


class _OfActivated(Function):
    """(z_NF, f(z), weight, bias, index, activation) -> f(z) W^T + b as a function of z."""

    @staticmethod
    def forward(
        ctx: Any, z_NF: Tensor, h_NF: Tensor, weight: Tensor, bias: Tensor | None, index: BlockIndex, activation: str
    ) -> Tensor:
        ctx.save_for_backward(z_NF, h_NF, weight)
        ctx.index, ctx.version, ctx.activation = index, index.mask._version, activation
        return gpu.forward(h_NF, weight, bias, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z_NF, h_NF, weight = ctx.saved_tensors
        _check_topology(ctx)
        needs_dz, _, needs_dweight, needs_dbias = ctx.needs_input_grad[:4]
        dy_NO = dy.contiguous()
        dz = gpu.activated_input_gradient(dy_NO, weight, ctx.index, ctx.activation, z_NF) if needs_dz else None
        dweight = gpu.weight_gradient(dy_NO, h_NF, ctx.index) if needs_dweight else None
        return dz, None, dweight, bias_gradient(dy_NO) if needs_dbias else None, None, None


def _check_topology(ctx: Any) -> None:
    assert ctx.version == ctx.index.mask._version, "the topology was changed between forward and backward pass"
