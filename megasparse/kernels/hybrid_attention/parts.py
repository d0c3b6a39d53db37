"""Hybrid sparse attention by parts: exact, in plain PyTorch, at the cost of about the live entries.

A pattern is a few batches of equal tiles (`tiles.py`), and each batch is a batched matrix product. The forward pass
joins what a query gets from several of them by the log-sum-exp. The backward pass gives every tile the joined output
and the joined log-sum-exp, with which its probabilities are the final ones: p = exp(s - lse), ds = p (dp - delta),
delta = sum(dO O), as in ring attention. So there is no gradient through the joining.

Scores and probabilities are float32 (float64 for float64 inputs), and so are the products: heads are widened in groups
whose scores fit into a cache. Dense bfloat16 products are 10 to 100 times slower than float32 ones on CPUs without
instructions for them, and widening a group is cheap on the others. Nothing of size T x T is made.

Tensor names: B samples, G key-value heads, R query heads of each, T tokens, D head dimension; within a group of heads
X = samples x heads, L = T with a margin on both sides, N tiles, Q queries and K keys of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.hybrid_attention.layout import Group, Layout
from megasparse.kernels.hybrid_attention.tiles import Tiles, View, pattern_tiles


def attend(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    pattern: str,
    stride: int,
    scale: float | None,
    documents_BT: Tensor | None = None,
) -> Tensor:
    """Softmax attention of all heads under one pattern. Returns [B, H, T, D] in the dtype of `q_BHTD`."""
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    return PartsAttention.apply(q_BHTD, k_BGTD, v_BGTD, documents_BT, pattern, stride, scale)


def executed_entries(pattern: str, seq_length: int, stride: int) -> int:
    """Scores computed per head: all entries of the tiles, masked ones and overhanging tokens included."""
    return sum(part.entries for part in pattern_tiles(pattern, seq_length, stride))


class PartsAttention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, pattern: str, stride: int, scale: float
    ) -> Tensor:
        layout = Layout(q, k, documents, pattern, stride)
        out = empty_tokens_first(q)
        lse = torch.empty(*q.shape[:3], 1, dtype=layout.dtype, device=q.device)
        q_BGRTD, out_BGRTD, lse_BGRT1 = (x.unflatten(1, layout.heads) for x in (q, out, lse))
        for group in layout.groups():
            loaded = layout.load(q_BGRTD[group], scale), layout.load_keys(k, group), layout.load_keys(v, group)
            out_XLD, lse_XL1 = _attend_group(layout, group, *loaded)
            out_BGRTD[group] = layout.tokens(out_XLD, group)
            lse_BGRT1[group] = layout.tokens(lse_XL1, group)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.settings = pattern, stride, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, documents, out, lse = ctx.saved_tensors
        pattern, stride, scale = ctx.settings
        layout = Layout(q, k, documents, pattern, stride)
        dq = empty_tokens_first(q)
        dk, dv = (empty_tokens_first(x, layout.dtype).zero_() for x in (k, v))
        names = q, dq, out, dout, lse
        q_BGRTD, dq_BGRTD, out_BGRTD, dout_BGRTD, lse_BGRT1 = (x.unflatten(1, layout.heads) for x in names)
        for group in layout.groups():
            loaded = layout.load(q_BGRTD[group], scale), layout.load_keys(k, group), layout.load_keys(v, group)
            dout_XLD, lse_XL1 = layout.load(dout_BGRTD[group]), layout.load(lse_BGRT1[group])
            delta_XL1 = (layout.load(out_BGRTD[group]) * dout_XLD).sum(-1, keepdim=True)
            gradients = _differentiate_group(layout, group, *loaded, dout_XLD, lse_XL1, delta_XL1)
            dq_BGRTD[group] = layout.tokens(gradients[0].mul_(scale), group)
            for total, gradient in ((dk, gradients[1]), (dv, gradients[2])):
                total[group[:2]] += layout.tokens(gradient, group).sum(2)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None



def _attend_group(
    layout: Layout, group: Group, q_XLD: Tensor, k_XLD: Tensor, v_XLD: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps [X, L, 1]; the margin holds no meaning."""
    documents = layout.load_documents(group)
    out_XLD = torch.zeros_like(q_XLD)
    top_XL1, total_XL1 = (q_XLD.new_zeros(*q_XLD.shape[:2], 1) for _ in range(2))
    for tiles, masks in layout.tiles:
        scores, (_, _, values) = _masked_scores(layout, tiles, masks, q_XLD, k_XLD, v_XLD, documents)
        tops, totals, outs = (layout.of(x, tiles, tiles.queries) for x in (top_XL1, total_XL1, out_XLD))
        top = scores.amax(-1, keepdim=True)
        if tiles.joins:
            before = tops.reshape(top.shape)
            top = torch.maximum(top, before)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        out = torch.bmm(weights, values, out=layout.take("rows", *weights.shape[:2], values.shape[-1]))
        if tiles.joins:
            factor = before.sub_(top).exp_()
            total.addcmul_(factor, totals.reshape(top.shape))
            out.addcmul_(factor, outs.reshape(out.shape))
        for whole, part in ((tops, top), (totals, total), (outs, out)):
            whole.copy_(part.view(whole.shape))
    return out_XLD.div_(total_XL1), total_XL1.log_().add_(top_XL1)


def _differentiate_group(
    layout: Layout,
    group: Group,
    q_XLD: Tensor,
    k_XLD: Tensor,
    v_XLD: Tensor,
    dout_XLD: Tensor,
    lse_XL1: Tensor,
    delta_XL1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loaded queries, keys and values."""
    documents = layout.load_documents(group)
    gradients = tuple(torch.zeros_like(x) for x in (q_XLD, k_XLD, v_XLD))
    for tiles, masks in layout.tiles:
        weights, (queries, keys, values) = _masked_scores(layout, tiles, masks, q_XLD, k_XLD, v_XLD, documents)
        douts, lse, delta = (layout.of(x, tiles, tiles.queries).flatten(2, -2).flatten(0, 1) for x in (dout_XLD, lse_XL1, delta_XL1))
        weights.sub_(lse).exp_()
        keys_shape = "rows", *keys.shape
        layout.add(gradients[2], tiles, tiles.keys, torch.bmm(weights.mT, douts, out=layout.take(*keys_shape)))
        dscores = torch.bmm(douts, values.mT, out=layout.take("dscores", *weights.shape))
        dscores.sub_(delta).mul_(weights)
        layout.add(gradients[1], tiles, tiles.keys, torch.bmm(dscores.mT, queries, out=layout.take(*keys_shape)))
        layout.add(gradients[0], tiles, tiles.queries, torch.bmm(dscores, keys, out=layout.take("rows", *queries.shape)))
    return gradients


def _masked_scores(
    layout: Layout,
    tiles: Tiles,
    masks: list[tuple[slice, Tensor]],
    q_XLD: Tensor,
    k_XLD: Tensor,
    v_XLD: Tensor,
    documents_bL1: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Scores [X N, Q, K] with -inf where a pair is dead, and queries, keys and values of the tiles."""
    views = (q_XLD, tiles.queries), (k_XLD, tiles.keys), (v_XLD, tiles.keys)
    queries, keys, values = (layout.of(x, tiles, view).flatten(2, -2).flatten(0, 1) for x, view in views)
    scores = torch.bmm(queries, keys.mT, out=layout.take("scores", *queries.shape[:2], keys.shape[1]))
    by_tile = scores.unflatten(0, (-1, tiles.num_tiles))
    for piece, mask in masks:
        by_tile[:, piece].add_(mask)
    if documents_bL1 is not None:
        query, key = (layout.of(documents_bL1, tiles, view).flatten(2, -2) for view in (tiles.queries, tiles.keys))
        apart = query != key.mT
        by_tile.unflatten(0, (apart.shape[0], -1)).masked_fill_(apart.unsqueeze(1), -math.inf)
    return scores, (queries, keys, values)


def empty_tokens_first(x_BHTD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory for a tensor like this one whose heads of a token lie together, as layers want them."""
    return torch.empty_like(x_BHTD.transpose(1, 2), dtype=dtype, memory_format=torch.contiguous_format).transpose(1, 2)
