"""Hybrid sparse attention by parts: exact, in plain PyTorch, at the cost of about the active entries.

A pattern is a few batches of equal tiles (`tiles.py`), and each batch is a batched matrix product. The forward pass
joins what a query gets from several of them by the log-sum-exp. The backward pass gives every tile the joined output
and the joined log-sum-exp, with which its probabilities are the final ones: p = exp(s - lse), ds = p (dp - delta),
delta = sum(dO O), as in ring attention. So there is no gradient through the joining.

Scores and probabilities are float32 (float64 for float64 inputs), and so are the products: heads are widened in groups
whose scores fit into a cache. Dense bfloat16 products are 10 to 100 times slower than float32 ones on CPUs without
instructions for them, and widening a group is cheap on the others. Nothing of size T x T is made.

Tensor names: B samples, H query heads, G key-value heads, T tokens, D head dimension; see `layout.py` for those of a
group of heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megasparse.kernels.hybrid_attention.heads import Heads
from megasparse.kernels.hybrid_attention.layout import Layout, TileView, products
from megasparse.kernels.hybrid_attention.tiles import pattern_tiles


def forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> None:
    """See `operators.py`; all heads have one pattern and offset. The log-sum-exp is that of the scores."""
    layout = Layout(q, k, heads)
    _by_group(layout, GroupForward(layout, q.shape[-1]), (q, k, v, out, lse.unsqueeze(-1)))


def backward(
    gradients: tuple[Tensor, ...], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: Heads
) -> None:
    """See `operators.py`."""
    layout = Layout(q, k, heads)
    _by_group(layout, GroupBackward(layout, q.shape[-1]), (q, k, v, out, lse.unsqueeze(-1), dout, *gradients))


def executed_entries(pattern: str, seq_length: int, stride: int, offset: int = 0) -> int:
    """Scores computed per head: all entries of the tiles, masked ones and overhanging tokens included."""
    return sum(part.entries for part in pattern_tiles(pattern, seq_length, stride, offset))


def _by_group(layout: Layout, run: Callable[..., None], tensors: tuple[Tensor, ...]) -> None:
    by_key_head = [layout.by_key_head(x) for x in tensors]
    for group in layout.groups():
        layout.load_documents(group)
        run(*(x[group] for x in by_key_head))


class GroupForward:
    """Forward pass of a group of heads, in buffers that the groups share."""

    def __init__(self, layout: Layout, head_dim: int) -> None:
        self._layout, self._scale = layout, 1 / math.sqrt(head_dim)
        q, k, v, out = (layout.buffer(head_dim) for _ in range(4))
        top, total = layout.buffer(1), layout.buffer(1)
        self._q, self._k, self._v, self._out, self._top, self._total = map(layout.tokens, (q, k, v, out, top, total))
        self._tiles = list(zip(*map(layout.queries, (q, out, top, total)), *map(layout.keys, (k, v)), strict=True))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Fill `out` and `lse` of the group from its queries, keys and values."""
        self._q.copy_(q).mul_(self._scale)
        self._k.copy_(k)
        self._v.copy_(v)
        for number, views in enumerate(self._tiles):
            self._attend(number, *views)
        torch.log(self._total, out=lse).add_(self._top)
        out.copy_(self._out.div_(self._total))

    def _attend(
        self, number: int, q: TileView, out: TileView, top: TileView, total: TileView, k: TileView, v: TileView
    ) -> None:
        """Join what the queries of one batch of tiles get from its keys to what they have: sum, divisor, maximum."""
        take, joins = self._layout.take, self._layout.tiles[number].joins
        queries, keys, values = q.read(), k.read(), v.read()
        rows = top.strided.shape[:-1]
        scores = take("scores", *rows, keys[0].shape[1])
        products(queries, [key.mT for key in keys], matrices(scores, queries))
        self._layout.mask_(scores, number)
        maximum = torch.amax(scores, -1, keepdim=True, out=take("maximum", *rows, 1))
        if joins:
            torch.maximum(maximum, top.strided, out=maximum)
        weights = scores.sub_(maximum).exp_()
        divisor = torch.sum(weights, -1, keepdim=True, out=take("divisor", *rows, 1))
        into = None if joins else out.memory()
        result = take("rows", *out.strided.shape)
        products(matrices(weights, queries), values, matrices(result, queries) if into is None else into)
        if joins:
            factor = torch.sub(top.strided, maximum, out=take("factor", *rows, 1)).exp_()
            divisor.addcmul_(factor, total.strided)
            result.addcmul_(factor, out.strided)
        if into is None:
            out.strided.copy_(result)
        top.strided.copy_(maximum)
        total.strided.copy_(divisor)


class GroupBackward:
    """Backward pass of a group of heads, in buffers that the groups share."""

    def __init__(self, layout: Layout, head_dim: int) -> None:
        self._layout, self._scale = layout, 1 / math.sqrt(head_dim)
        q, k, v, dout, dq, dk, dv = (layout.buffer(head_dim) for _ in range(7))
        lse, delta = layout.buffer(1), layout.buffer(1)
        self._inputs = list(map(layout.tokens, (q, k, v, lse, dout)))
        self._delta, self._sums = layout.tokens(delta), (dq, dk, dv)
        self._tiles = list(
            zip(*map(layout.queries, (q, lse, dout, delta, dq)), *map(layout.keys, (k, v, dk, dv)), strict=True)
        )

    def __call__(self, *tensors: Tensor) -> None:
        """Fill the gradients of the group, the last three, summed over the query heads of a key-value head."""
        q, k, v, out, lse, dout, dq, dk, dv = tensors
        for mine, given in zip(self._inputs, (q, k, v, lse, dout), strict=True):
            mine.copy_(given)
        self._inputs[0].mul_(self._scale)
        products = torch.mul(self._inputs[-1], out, out=self._layout.take("products", *out.shape))
        torch.sum(products, -1, keepdim=True, out=self._delta)
        for total in self._sums:
            total.zero_()
        for number, views in enumerate(self._tiles):
            self._differentiate(number, views)
        dq_sum, dk_sum, dv_sum = map(self._layout.tokens, self._sums)
        dq.copy_(dq_sum.mul_(self._scale))
        for gradient, total in ((dk, dk_sum), (dv, dv_sum)):
            gradient.copy_(total if total.shape == gradient.shape else total.sum(2, keepdim=True))

    def _differentiate(self, number: int, views: tuple[TileView, ...]) -> None:
        """Add the gradients of one batch of tiles."""
        q, lse, dout, delta, dq, k, v, dk, dv = views
        take = self._layout.take
        queries, douts, keys, values = q.read(), dout.read(), k.read(), v.read()
        shape = *lse.strided.shape[:-1], keys[0].shape[1]
        weights, dscores = take("scores", *shape), take("dscores", *shape)
        columns, rows = take("columns", *dk.strided.shape), take("rows", *dq.strided.shape)
        of_weights, of_dscores, of_columns = (matrices(x, queries) for x in (weights, dscores, columns))
        products(queries, [key.mT for key in keys], of_weights)
        self._layout.mask_(weights, number)
        weights.sub_(lse.strided).exp_()
        products([weight.mT for weight in of_weights], douts, of_columns)
        dv.add(columns)
        products(douts, [value.mT for value in values], of_dscores)
        dscores.sub_(delta.strided).mul_(weights)
        products([dscore.mT for dscore in of_dscores], queries, of_columns)
        dk.add(columns)
        into = None if self._layout.tiles[number].joins else dq.memory()
        products(of_dscores, keys, matrices(rows, queries) if into is None else into)
        if into is None:
            dq.add(rows)


def matrices(x: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Contiguous [X, N, Q, K] as matrices, in as many tensors as `like`."""
    return list(x.flatten(0, 1).chunk(len(like)))
