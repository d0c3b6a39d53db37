"""Two linear layers and the activation between them in the products of the two, where both layers run the Triton
kernels: `down(activation(up(x)))` without a pass of its own through the width inside.

    y = fused_pair(mlp.up, mlp.down, x, "gelu", kernel="auto")     # None: compute them one by one

Whatever is more than a product over active blocks keeps the layers apart: a whole weight, a low-rank branch, a dense
gradient that a topology update asks for, tensor-parallel ranks, another class of layer, hooks (which see what goes into
a layer and comes out of it, or fetch its parameters first, as ZeRO stage 3 does), torch.compile. So does a pass without
gradients, which would write the input of the activation for nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megasparse.kernels.block_sparse import activated
from megasparse.kernels.elementwise import takes_triton
from megasparse.layers.linear import SparseLinear
from megasparse.layers.packed import PackedLinear


def fused_pair(up: nn.Module, down: nn.Module, x: Tensor, activation: str, *, kernel: str) -> Tensor | None:
    """`down(f(up(x)))`, or None where the two layers must be called.

    activation: its name in ``utils.activations``. kernel: of what lies between the products, as in ``elementwise``; one
    by name other than `triton` is not passed over.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or activation not in activated.NAMES:
        return None
    first = _blocks(up, x)
    second = None if first is None else _blocks(down, x)
    if first is None or second is None or not takes_triton(kernel, x):
        return None
    if not any(t is not None and t.requires_grad for t in (x, *first[:2], *second[:2])):
        return None
    return activated.pair(x, first, second, activation)


def _blocks(layer: nn.Module, x: Tensor) -> activated.Blocks | None:
    """What the Triton kernels multiply, where they and nothing else compute the layer for as many tokens as x has."""
    # By the very class: what else a subclass may do is not known here.
    if type(layer) not in (SparseLinear, PackedLinear) or _has_hooks(layer):
        return None
    assert isinstance(layer, SparseLinear)
    if layer.index is None or layer.low_rank or layer.collect_dense_gradient or layer.tensor_parallel.size > 1:
        return None
    if layer.backend_for(x) != "triton":
        return None
    return activated.Blocks(layer.weight, layer.bias, layer.index)


def _has_hooks(layer: nn.Module) -> bool:
    held = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return any(held) or torch.nn.modules.module._has_any_global_hook()
