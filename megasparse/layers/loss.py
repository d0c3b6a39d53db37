"""Cross entropy of next-token prediction.

The rows that pad the vocabulary take no part: the model slices them off the logits. A slice costs nothing in the
forward pass, cannot overflow as -inf would in a later sum, and gives the padded rows a gradient of exactly zero.
Tensor names: B samples, T tokens, V entries of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Every token counts: no target can have this value, so an out-of-range target is an error and never skipped.
IGNORE_NONE = torch.iinfo(torch.int64).min


def cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Mean over all B * T tokens of -log softmax(logits)[target], a float32 scalar in nats.

    The logits may have any floating dtype, the targets are int64; computed in float32.
    """
    logits = logits_BTV.flatten(0, 1).float()
    return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORE_NONE)
