"""An MLP that is computed as a mixture of its own clusters of neurons (Zhang et al. 2024, arXiv 2410.03440).

    mlp.in_training = ClusteredMLP(router, active=4, shards=1)

The neurons of a cluster lie side by side. Each token passes through the clusters whose rows of the router have the
largest products with it; with all of them active the function is that of the dense MLP. Only what is chosen is
computed: the tokens of a cluster are put together, and each cluster has dense products of its own, forward and
backward.

Names: B samples, T tokens, C hidden size, N = B T, K active clusters, E clusters, W neurons in each (of this rank).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels import dense_products
from megasparse.kernels.dense_products import dense_linear
from megasparse.layers.linear import Linear
from megasparse.layers.mlp import MLP


class Routes(NamedTuple):
    """Pairs of a token and a cluster, ordered by cluster."""

    tokens: Tensor
    """int64 [N K]: token of each pair."""
    places: Tensor
    """int64 [N, K]: where the pairs of a token stand."""
    counts: list[int]
    """Tokens of each cluster."""
    shape: tuple[int, ...]
    """Of the input, [B, T, C]."""


class ClusteredMLP:
    """What computes an MLP in training.

    Args:
        router: float32 [E, C], this rank's clusters in order; it has no gradient.
        active: clusters per token, on this rank; a multiple of `shards`.
        shards: pieces of this rank's neurons that each choose their share of the active clusters.
    """

    def __init__(self, router: Tensor, active: int, shards: int) -> None:
        assert router.shape[0] % shards == active % shards == 0 < active <= router.shape[0]
        self.router, self.active, self.shards = router, active, shards
        self._routes: Routes | None = None
        self._kernels: dict[tuple[int, int, int, torch.dtype], str] = {}

    def __call__(self, mlp: MLP, x_BTC: Tensor) -> Tensor:
        z_PW = mlp.up(x_BTC, lambda x, bias: self._up(mlp.up, x, bias))
        y_BTC = mlp.down(mlp.activation(z_PW), lambda h, bias: self._down(mlp.down, h, bias))
        self._routes = None
        return y_BTC

    @torch.no_grad()
    def routes(self, x_BTC: Tensor) -> Routes:
        """The host waits for the device here: it has to know how many tokens each cluster has."""
        clusters, active = self.router.shape[0] // self.shards, self.active // self.shards
        scores = (x_BTC.flatten(0, -2).float() @ self.router.t()).view(-1, self.shards, clusters)
        first = torch.arange(self.shards, device=scores.device)[:, None] * clusters
        chosen_NK = (scores.topk(active, dim=-1).indices + first).flatten(1)
        order = chosen_NK.flatten().sort(stable=True).indices
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        counts = chosen_NK.flatten().bincount(minlength=self.router.shape[0]).tolist()
        return Routes(order // self.active, places.view_as(chosen_NK), counts, tuple(x_BTC.shape))

    def _up(self, layer: Linear, x_BTC: Tensor, bias: Tensor | None) -> Tensor:
        """In place of ``layer.product``: [N K, W], pairs by cluster."""
        self._routes = self.routes(x_BTC)
        x_PC = _Gather.apply(x_BTC.flatten(0, -2), self._routes.tokens, self._routes.places)
        width = layer.weight.shape[0] // self.router.shape[0]
        biases = [None] * len(self._routes.counts) if bias is None else bias.split(width)
        return self._grouped(layer, x_PC, layer.weight.split(width), biases)

    def _down(self, layer: Linear, h_PW: Tensor, bias: Tensor | None) -> Tensor:
        routes = self._routes
        assert routes is not None
        weights = layer.weight.split(h_PW.shape[1], dim=1)
        y_PC = self._grouped(layer, h_PW, weights, [None] * len(weights))
        y_NC = _Combine.apply(y_PC, routes.tokens, routes.places)
        y_NC = y_NC if bias is None else y_NC + bias
        return y_NC.view(*routes.shape[:-1], y_NC.shape[-1])

    def _grouped(self, layer: Linear, x_PI: Tensor, weights: Any, biases: Any) -> Tensor:
        """Rows of cluster after cluster, times the weight of each."""
        assert self._routes is not None
        rows, columns = weights[0].shape
        mean = max(len(x_PI) // len(weights), 1)
        key = (mean, rows, columns, x_PI.dtype)
        if key not in self._kernels:
            # The choice for the mean number of tokens holds for each cluster: theirs differ in each step.
            self._kernels[key] = dense_products.choose(
                layer.dense_kernel, x_PI.device.type, x_PI.dtype, mean, (columns, rows)
            )
        parts = zip(x_PI.split(self._routes.counts), weights, biases, strict=True)
        return torch.cat(
            [
                dense_linear(part, weight, bias, kernel=self._kernels[key] if len(part) else "torch")
                for part, weight, bias in parts
            ]
        )


class _Gather(torch.autograd.Function):
    """(x_NC, tokens, places) -> x of each pair [N K, C]."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x_NC.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_PC: Tensor) -> tuple[Tensor, None, None]:
        return _sum_of_pairs(dx_PC, *ctx.saved_tensors), None, None


class _Combine(torch.autograd.Function):
    """(y_PC, tokens, places) -> the sum over the pairs of each token [N, C]."""

    @staticmethod
    def forward(ctx: Any, y_PC: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum_of_pairs(y_PC, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NC: Tensor) -> tuple[Tensor, None, None]:
        return dy_NC.index_select(0, *ctx.saved_tensors), None, None


def _sum_of_pairs(y_PC: Tensor, places_NK: Tensor) -> Tensor:
    """In the order of the clusters, so that a sum is the same in every run."""
    first, *others = places_NK.sort(dim=1).values.unbind(1)
    total = y_PC.index_select(0, first)
    for place in others:
        total += y_PC.index_select(0, place)
    return total
