"""A perceptron y = W_down relu(W_up x)^2 whose activation is 2:4 sparse in training (Haziza et al. 2025, arXiv
2503.16672).

    mlp.in_training = SparseActivation(kernel="reference")

Forward pass and input gradients take the two largest of four consecutive features, h_f. Weight gradients sum over the
tokens: they take two of four tokens of h_f, h_t, and the same entries of the gradient of z = W_up x, whose zeros are
those of h_f. So the gradients are exactly those of the forward pass but for what the tokens lose, which is counted.
Names: B samples, T tokens, C hidden size, F width inside (of this rank).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels import activation_sparsity as kernels
from megasparse.layers.linear import Linear
from megasparse.layers.mlp import MLP


class SparseActivation:
    """What computes a perceptron in training. kernel: of ``activation_sparsity``; it is taken where a weight is a whole
    matrix, as block-sparse weights have products of their own."""

    def __init__(self, kernel: str = "reference") -> None:
        self.kernel = kernel
        self.mass: Tensor | None = None
        """Sums of the activation since ``forget``: whole, what the features leave of it, and then the tokens; float64
        [3] on the device, this rank's."""
        self._orders: dict[int, Tensor] = {}

    def forget(self) -> None:
        self.mass = None

    def __call__(self, mlp: MLP, x_BTC: Tensor) -> Tensor:
        z_BTF = mlp.up(x_BTC, partial(_product, self, mlp.up, True))
        h_BTF = z_BTF.relu().square()
        pruned_BTF = h_BTF * kernels.keep_features(h_BTF.detach())
        return mlp.down(pruned_BTF, partial(_product, self, mlp.down, False))

    def takes_whole(self, x_BTF: Tensor) -> bool:
        """Whether the kernel multiplies whole matrices. A branch that layer dropping only visits, with one token of
        each sample, has too few for it, and comes to nothing."""
        return self.kernel == "semi_structured" and x_BTF.shape[1] > 1

    def order(self, x_BTF: Tensor) -> Tensor:
        tokens = x_BTF.shape[1]
        if tokens not in self._orders:
            self._orders[tokens] = kernels.token_order(tokens, x_BTF.device)
        return self._orders[tokens]

    def count(self, whole: Tensor, by_features: Tensor, by_tokens: Tensor) -> None:
        sums = torch.stack([part.sum(dtype=torch.float64) for part in (whole, by_features, by_tokens)])
        self.mass = sums if self.mass is None else self.mass + sums


def _product(form: SparseActivation, layer: Linear, is_up: bool, x: Tensor, bias: Tensor | None) -> Tensor:
    """In place of ``layer.product``."""
    weights = [parameter for parameter in layer.product_parameters() if parameter is not layer.bias]
    return _Product.apply(x, bias, form, layer, is_up, *weights)


class _Product(torch.autograd.Function):
    """(x_BTI, bias, form, layer, whether it is `up`, *weights) -> x W^T + b.

    The pruned side is the output of `up`, whose entries are known by z, and the input of `down`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, form: SparseActivation, layer: Linear, is_up: bool, *weights: Tensor
    ) -> Tensor:
        matrix = layer.whole_weight() if form.takes_whole(x) else None
        if matrix is None or is_up:
            y = layer.product(x, bias)
        else:
            y = kernels.product(x.flatten(0, 1), matrix.t(), form.kernel).unflatten(0, x.shape[:2])
            y = y if bias is None else y + bias
        ctx.save_for_backward(x, *([y] if is_up else []))
        ctx.form, ctx.layer, ctx.weights = form, layer, weights
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        form, layer, (x, *output) = ctx.form, ctx.layer, ctx.saved_tensors
        whole = output[0].relu().square() if output else x
        h = whole * kernels.keep_features(whole) if output else x
        order = form.order(h)
        kept = kernels.keep_tokens(h, order)
        if output:
            form.count(whole, h, h * kept)
        left, right = (dy * kept, x) if output else (dy, x * kept)
        matrix = layer.whole_weight() if form.takes_whole(x) else None
        needs_bias = ctx.needs_input_grad[1]
        dbias = dy.flatten(0, 1).sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)) if needs_bias else None
        if matrix is None:
            dx, dweights = _by_layer(ctx, dy, left, right)
        else:
            # Of `up` the gradient is the sparse matrix, of `down` it is dense.
            flat = dy.flatten(0, 1)
            dx = (kernels.product(flat, matrix, form.kernel) if output else flat @ matrix).unflatten(0, x.shape[:2])
            place = order, kernels.is_dense(h), form.kernel
            dweight = kernels.weight_gradient(left, right, *place) if output else None
            dweights = [kernels.weight_gradient(right, left, *place).t() if dweight is None else dweight]
        return dx, None if dbias is None else dbias.to(dy.dtype), None, None, None, *dweights


def _by_layer(ctx: Any, dy: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Input gradient, and weight gradients of other operands, by the layer's own product: whatever its kernel, its
    storage and what a topology update asks for, at the price of two more forward products."""
    with torch.enable_grad():
        own = right.detach().requires_grad_()
        (dx,) = torch.autograd.grad(ctx.layer.product(own, None), [own], dy)
        dweights = torch.autograd.grad(ctx.layer.product(right.detach(), None), ctx.weights, left)
    return dx, list(dweights)
