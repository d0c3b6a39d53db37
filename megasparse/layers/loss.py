"""The end of the model: logits whose vocabulary is divided over the tensor-parallel ranks, and their cross entropy.

The rows that pad the vocabulary take no part: they are sliced off the logits. A slice costs nothing in the forward
pass, cannot overflow as -inf would in a later sum, and gives the padded rows a gradient of exactly zero.
Tensor names: B samples, T tokens, N = B T, V entries of the vocabulary, W those of them that this rank holds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megasparse.parallel import Axis, TensorParallel


class Vocabulary:
    """What a rank knows of the vocabulary: `size` entries in a table of `rows` rows, divided evenly."""

    def __init__(self, size: int, rows: int, tensor_parallel: TensorParallel) -> None:
        self.size, self.tensor_parallel = size, tensor_parallel
        share = rows // tensor_parallel.size
        self.first = tensor_parallel.rank * share
        self.width = min(max(size - self.first, 0), share)
        """Entries on this rank that are no padding; 0 where it holds padding only."""

    def logits(self, logits_BTW: torch.Tensor) -> torch.Tensor:
        """Logits of all entries, [B, T, V], on every rank."""
        return self.tensor_parallel.join_channels(logits_BTW)[..., : self.size]

    def cross_entropy(self, logits_BTW: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean over all B * T tokens of -log softmax(logits)[target], a float32 scalar in nats, same on every rank.

        The logits may have any floating dtype; computed in float32. Raises RuntimeError for a target that is no entry.
        """
        targets_N = targets_BT.flatten()
        torch._assert_async(
            ((targets_N >= 0) & (targets_N < self.size)).all(), "a target is no entry of the vocabulary"
        )
        logits_NW = logits_BTW[..., : self.width].flatten(0, 1)
        return _CrossEntropy.apply(logits_NW, targets_N - self.first, self.tensor_parallel.axis)


class _CrossEntropy(torch.autograd.Function):
    """log softmax over the divided vocabulary: the local one, shifted by log(local sum / sum over the ranks)."""

    @staticmethod
    def forward(ctx: Any, logits_NW: torch.Tensor, local_targets_N: torch.Tensor, axis: Axis) -> torch.Tensor:
        logits_NW = logits_NW.detach()
        scores_NW = logits_NW.log_softmax(dim=-1, dtype=torch.float32)
        shift_N = _shift(logits_NW, scores_NW, axis)
        here_N = (local_targets_N >= 0) & (local_targets_N < scores_NW.shape[1])
        rows, columns = here_N.nonzero().squeeze(1), local_targets_N[here_N]
        picked_N = torch.zeros_like(shift_N)
        picked_N[rows] = scores_NW[rows, columns] + shift_N[rows]
        ctx.save_for_backward(scores_NW, shift_N, rows, columns)
        ctx.dtype = logits_NW.dtype
        return -axis.sum_(picked_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scores_NW, shift_N, rows, columns = ctx.saved_tensors
        scale = dloss / shift_N.numel()
        gradient_NW = (scores_NW + shift_N.unsqueeze(1)).exp_().mul_(scale)
        gradient_NW[rows, columns] -= scale
        return gradient_NW.to(ctx.dtype), None, None


def _shift(logits_NW: torch.Tensor, scores_NW: torch.Tensor, axis: Axis) -> torch.Tensor:
    """log of this rank's share of the probability, [N]: 0 on a rank that holds all entries, -inf without any."""
    if axis.size == 1:
        return torch.zeros_like(scores_NW[:, 0])
    if logits_NW.shape[1] == 0:
        local_N = torch.full(logits_NW.shape[:1], -torch.inf, device=logits_NW.device)
    else:
        local_N = logits_NW.logsumexp(dim=-1) if logits_NW.dtype == torch.float32 else logits_NW.float().logsumexp(-1)
    largest_N = axis.max_(local_N.clone())
    return local_N - largest_N - axis.sum_((local_N - largest_N).exp()).log()
