"""What the cross entropy is, in torch's own operators: for every device and dtype.

Tensor names: N tokens, W entries of the vocabulary that this rank holds, those that pad it included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cross_entropy_(
    logits_NW: Tensor,
    targets_N: Tensor,
    width: int,
    wants_gradient: bool,
    joined: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None,
) -> Tensor:
    """log(sum of exp(logits)) - logits[target] over the first `width` entries of each row, [N], in float32.

    Overwrites the logits: where the gradient is wanted with that of the losses' sum, which is 0 in the entries that pad
    the rows.

    Args:
        logits_NW: any floating dtype; rows may lie apart, their entries not.
        targets_N: int64; -1 where the target is no entry of this rank.
        width: entries that are no padding.
        wants_gradient: see above.
        joined: where the rows are divided over ranks, makes of the largest logits, the sums of exp(logit - largest) and
            the logits of the targets (0 where there is none), all float32 [N], those of whole rows. None: they are.
    """
    logits_NW[:, width:] = -torch.inf
    scores_NW = logits_NW.to(torch.float32)
    here_N = targets_N >= 0
    columns_N1 = targets_N.clamp(min=0).unsqueeze(1)
    picked_N = scores_NW.gather(1, columns_N1).squeeze(1).masked_fill(~here_N, 0)
    own_N = scores_NW.amax(1)
    # A rank that holds padding only has no largest logit, and subtracts 0 from its -inf.
    scores_NW.sub_(own_N.clamp(min=torch.finfo(torch.float32).min).unsqueeze(1))
    sums_N = scores_NW.exp_().sum(1)
    largest_N, whole_N = own_N, sums_N
    if joined is not None:
        largest_N, whole_N, picked_N = joined(own_N, sums_N, picked_N)
    if wants_gradient:
        factors_N = (own_N - largest_N).exp() / whole_N
        scores_NW.mul_(factors_N.unsqueeze(1)).scatter_add_(1, columns_N1, -here_N.float().unsqueeze(1))
        if scores_NW is not logits_NW:
            logits_NW.copy_(scores_NW)
    return whole_N.log() - (picked_N - largest_N)
