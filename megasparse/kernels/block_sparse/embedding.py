"""Rows of a table that shares its weight with a sparse head, under the gradient rule of the sparse linear layer.

``SparseEmbedding`` reads dense storage, ``PackedEmbedding`` packed storage: there a row consists of the runs of
`block_size` entries that the active blocks of its block row hold, and of zeros. Work and memory are those of the rows
that are looked up, on any device; nothing of the size of the dense table is made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.block_sparse.storage import apply_mask_


class SparseEmbedding(torch.autograd.Function):
    """(ids, weight [rows, width], mask, block_size, dense_gradient) -> [*ids.shape, width]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, mask: Tensor, block_size: int, dense_gradient: bool) -> Tensor:
        ctx.save_for_backward(ids, mask)
        ctx.num_rows, ctx.block_size, ctx.dense_gradient = weight.shape[0], block_size, dense_gradient
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, mask = ctx.saved_tensors
        dweight = _summed(dy, ids, ctx.num_rows)
        if not ctx.dense_gradient:
            apply_mask_(dweight, mask, ctx.block_size)
        return None, dweight, None, None, None


class PackedEmbedding(torch.autograd.Function):
    """(ids, weight [S, b, b], probe, block_slots [R, C]) -> [*ids.shape, C b]; probe: see ``packed_linear``."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, probe: Tensor | None, block_slots: Tensor) -> Tensor:
        ctx.save_for_backward(ids, block_slots)
        ctx.shape = weight.shape
        runs, is_absent = _runs(ids, block_slots, weight.shape[-1])
        found = F.embedding(runs.masked_fill(is_absent, 0), weight.reshape(-1, weight.shape[-1]))
        return found.masked_fill_(is_absent.unsqueeze(-1), 0).flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ids, block_slots = ctx.saved_tensors
        (slots, block_size, _), num_rows = ctx.shape, block_slots.shape[0] * ctx.shape[1]
        dweight = dprobe = None
        if ctx.needs_input_grad[1]:
            runs, is_absent = _runs(ids, block_slots, block_size)
            dy_runs = dy.unflatten(-1, (-1, block_size))
            none = slots * block_size
            dweight = _summed(dy_runs, runs.masked_fill(is_absent, none), none + 1, none)[:none].view(ctx.shape)
        if ctx.needs_input_grad[2]:
            dprobe = _summed(dy, ids, num_rows)
        return None, dweight, dprobe, None


def _runs(ids: Tensor, block_slots: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """For each id and block column, [*ids.shape, C]: the run of the packed weight, counted in runs of `block_size`
    entries, and whether there is none."""
    slots = block_slots[ids // block_size]
    return slots * block_size + (ids % block_size).to(slots.dtype).unsqueeze(-1), slots < 0


def _summed(dy: Tensor, ids: Tensor, num_rows: int, left_out: int = -1) -> Tensor:
    """[num_rows, width]: the sum of the rows of dy of each id; nothing for the id `left_out`."""
    # The operator behind the gradient of F.embedding, where it is the padding index; -1 means none.
    return torch.ops.aten.embedding_dense_backward(dy.contiguous(), ids, num_rows, left_out, False)
