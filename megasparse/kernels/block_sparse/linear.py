"""The sparse linear layer as an autograd function over two custom operators.

The backend is chosen inside the operators (``dispatch.choose``), so that torch.compile sees two opaque calls with known
output shapes and CUDA graphs capture whatever they launch.

A backend is a module with two functions. All tensors have one dtype and device; sums are made in float32 or wider:

    forward(x_NI, weight, bias, index)
        y_NO = x W^T + b, of weight [O, I], or packed as `index` says, and bias [O] or None. x_NI has unit stride
        along I.
    backward(dy_NO, x_NI, weight, index, needs)
        dx_NI = dy W; dW = dy^T x, as the weight is stored, exactly zero outside of active blocks and in empty slots;
        db = sum of dy over the tokens. None for what is not needed. dy_NO is contiguous.

Names: N tokens, I input width, O output width, L active blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.block_sparse import cpu, dense, gpu, reference
from megasparse.kernels.block_sparse.dispatch import choose
from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.storage import stored

PRODUCTS: dict[str, Any] = {"reference": reference, "dense": dense, "cpu": cpu, "triton": gpu}


class SparseLinear(torch.autograd.Function):
    """(x_NI, weight, bias, probe, mask, *lists, block_size, dense_gradient, kernel, break_even) -> y_NO.

    The index is taken apart into tensors, as autograd and torch.compile want them. The gradient of `probe`, where it
    wants one (packed storage), is the dense dy^T x; `dense_gradient`: that of the weight is (dense storage).
    """

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight: Tensor, bias: Tensor | None, probe: Tensor | None, *rest: Any
    ) -> Tensor:
        *index, block_size, dense_gradient, kernel, break_even = rest
        ctx.save_for_backward(x_NI, weight, *index)
        ctx.settings = block_size, dense_gradient, kernel, break_even
        return block_sparse_forward(x_NI, weight, bias, index, block_size, kernel, break_even)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight, *index = ctx.saved_tensors
        block_size, dense_gradient, kernel, break_even = ctx.settings
        needs_dx, needs_dweight, needs_dbias, needs_dprobe = ctx.needs_input_grad[:4]
        dy_NO = dy.contiguous()
        # With the dense gradient at hand that of a packed weight is a part of it, with the bits of dense storage.
        makes_dense = dense_gradient or needs_dprobe
        needs = [needs_dx, needs_dweight and not makes_dense, needs_dbias]
        dx, dweight, dbias = block_sparse_backward(dy_NO, x_NI, weight, index, block_size, kernel, break_even, needs)
        dprobe = None
        if makes_dense and (needs_dweight or needs_dprobe):
            dprobe = dy_NO.t() @ x_NI
            dweight = dprobe if dense_gradient else stored(dprobe, _joined(index, block_size))
        none = (None,) * (len(index) + len(ctx.settings))
        return (
            dx if needs_dx else None,
            dweight if needs_dweight else None,
            dbias if needs_dbias else None,
            dprobe if needs_dprobe else None,
            *none,
        )


def _products(x_NI: Tensor, index: BlockIndex, kernel: str, break_even: float | None) -> Any:
    """Those of the backend that is chosen for the layer."""
    device, dtype, tokens = x_NI.device.type, x_NI.dtype, x_NI.shape[0]
    place = kernel, device, dtype, index.block_size, tokens, index.density, (x_NI.shape[1], _outputs(index))
    return PRODUCTS[choose(*place, break_even=break_even, is_packed=index.is_packed)]


def _outputs(index: BlockIndex) -> int:
    return index.mask.shape[0] * index.block_size


def _joined(index: list[Tensor], block_size: int) -> BlockIndex:
    mask, row_offsets, columns, *rest = index
    return BlockIndex(mask, block_size, columns.numel(), row_offsets, columns, *rest)


@torch.library.custom_op("megasparse::block_sparse_forward", mutates_args=())
def block_sparse_forward(
    x_NI: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    block_size: int,
    kernel: str,
    break_even: float | None,
) -> Tensor:
    """`forward` of the chosen backend. `index`: mask and lists of a ``BlockIndex``."""
    lists = _joined(index, block_size)
    return _products(x_NI, lists, kernel, break_even).forward(x_NI, weight, bias, lists)


@block_sparse_forward.register_fake
def _(x_NI, weight, bias, index, block_size, kernel, break_even):
    return x_NI.new_empty(x_NI.shape[0], _outputs(_joined(index, block_size)))


@torch.library.custom_op("megasparse::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    dy_NO: Tensor,
    x_NI: Tensor,
    weight: Tensor,
    index: list[Tensor],
    block_size: int,
    kernel: str,
    break_even: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of the chosen backend; an empty tensor where a gradient is not needed."""
    lists, needed = _joined(index, block_size), (needs[0], needs[1], needs[2])
    gradients = _products(x_NI, lists, kernel, break_even).backward(dy_NO, x_NI, weight, lists, needed)
    dx, dweight, dbias = (dy_NO.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return dx, dweight, dbias


@block_sparse_backward.register_fake
def _(dy_NO, x_NI, weight, index, block_size, kernel, break_even, needs):
    shapes = (x_NI.shape, weight.shape, dy_NO.shape[1:])
    dx, dweight, dbias = (
        dy_NO.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)
    )
    return dx, dweight, dbias
