"""SquareHead: how far the hidden states of a student are from a teacher's, in units of the teacher's own size.

For each pair of states and each set of tokens M (Kurtic et al. 2023, arXiv 2310.06927)

    ratio = mean_M((s - t)^2) / (mean_M(t^2) + epsilon),   means over |M| x C elements

and the loss is the sum, or the mean, of the ratios over the pairs. A student of zeros has a ratio just below 1. On one
block's output it is the normalised error of Puzzle (arXiv 2411.19146).
Tensor names: B samples, T tokens, C hidden size, L pairs of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.parallel import TensorParallel


def square_head(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    tokens_BT: Tensor | None = None,
    *,
    epsilon: float,
    reduction: Literal["sum", "mean"] = "sum",
    ratio_over: Literal["sample", "micro_batch"] = "sample",
    ranks: TensorParallel | None = None,
) -> Tensor:
    """The loss, a float32 scalar with graph through the student's states; sums are taken in float32.

    student, teacher: states [B, T, C] as they lie between layers: under sequence parallelism this rank's tokens, whose
    sums are added up over the ranks, numerator and denominator apart.
    tokens_BT: bool, which tokens are compared, of those of all ranks; None: all.
    ratio_over: M is the tokens of a sample, and the loss the mean over the samples; or those of the whole batch.
    """
    ranks = ranks or TensorParallel()
    own_BT = _own_tokens(tokens_BT, student[0], ranks)
    distances_LB = torch.stack([_SquaredDistance.apply(*pair, own_BT) for pair in zip(student, teacher, strict=True)])
    with torch.no_grad():
        sizes_LB = torch.stack([_squares(t, own_BT) for t in teacher])
        counts_B = own_BT.sum(1).float() * student[0].shape[-1]
    if ranks.sequence_parallel:
        distances_LB = ranks.reduce_from_tensor_parallel_region(distances_LB)
        sizes_LB, counts_B = ranks.axis.sum_(sizes_LB), ranks.axis.sum_(counts_B)
    if ratio_over == "micro_batch":
        distances_LB, sizes_LB = distances_LB.sum(1, keepdim=True), sizes_LB.sum(1, keepdim=True)
        counts_B = counts_B.sum(0, keepdim=True)
    counts_B = counts_B.clamp_min(1)
    # Where a teacher's state is all zeros and epsilon is 0, a student that meets it has no error.
    tiny = torch.finfo(torch.float32).tiny
    ratios_L = ((distances_LB / counts_B) / (sizes_LB / counts_B + epsilon).clamp_min(tiny)).mean(1)
    return ratios_L.sum() if reduction == "sum" else ratios_L.mean()


class _SquaredDistance(torch.autograd.Function):
    """(student [B, T, C], teacher, tokens bool [B, T]) -> sum over tokens and channels of their squared difference,
    float32 [B]. Keeps the states, which are there anyhow, instead of float32 copies of their differences."""

    @staticmethod
    def forward(ctx: Any, student_BTC: Tensor, teacher_BTC: Tensor, own_BT: Tensor) -> Tensor:
        ctx.save_for_backward(student_BTC)
        # A tensor of inference mode cannot be saved; the teacher's has no gradient.
        ctx.teacher, ctx.own = teacher_BTC, own_BT
        return _squares(student_BTC.float() - teacher_BTC.float(), own_BT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsums_B: Tensor) -> tuple[Tensor | None, ...]:
        (student_BTC,) = ctx.saved_tensors
        difference = (student_BTC.float() - ctx.teacher.float()).mul_(2 * dsums_B[:, None, None])
        difference.masked_fill_(~ctx.own.unsqueeze(2), 0)
        return difference.to(student_BTC.dtype), None, None


def _squares(x_BTC: Tensor, own_BT: Tensor) -> Tensor:
    return x_BTC.float().square().sum(2).masked_fill(~own_BT, 0).sum(1)


def _own_tokens(tokens_BT: Tensor | None, state_BTC: Tensor, ranks: TensorParallel) -> Tensor:
    """Of all tokens those that this rank holds states of, bool [B, its tokens]."""
    if tokens_BT is None:
        return torch.ones(state_BTC.shape[:2], dtype=torch.bool, device=state_BTC.device)
    return tokens_BT.chunk(ranks.size, dim=1)[ranks.rank] if ranks.sequence_parallel else tokens_BT
