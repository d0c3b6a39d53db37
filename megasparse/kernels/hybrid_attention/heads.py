"""What a backend of hybrid sparse attention is given: the heads of one call, and memory for what it makes of them.

Tensor names: B samples, H query heads, G key-value heads (H is a multiple of G), T tokens, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """What the query heads of one call see."""

    patterns: list[str]
    """Of each query head."""
    stride: int
    offsets: list[int]
    """Of each query head, 0 <= o < stride: the strided keys of a query are those with (query - key) mod stride = o,
    besides itself; token p lies in block (p + o) // stride. 0 where the pattern has no use for one."""
    documents_BT: Tensor | None

    @property
    def pattern(self) -> str:
        """The one of all heads."""
        assert len(set(self.patterns)) == 1, self.patterns
        return self.patterns[0]

    @property
    def offset(self) -> int:
        """The one of all heads."""
        assert len(set(self.offsets)) == 1, self.offsets
        return self.offsets[0]

    def document_bounds(self) -> tuple[Tensor | None, Tensor | None]:
        """First token of each token's document, and one more than its last one: int32 [B, T], or None twice."""
        if self.documents_BT is None:
            return None, None
        rows = self.documents_BT.contiguous()
        starts = torch.searchsorted(rows, rows, out_int32=True)
        return starts, torch.searchsorted(rows, rows, out_int32=True, right=True)


def empty_tokens_first(x_BHTD: Tensor) -> Tensor:
    """Uninitialised memory for a tensor like this one whose heads of a token lie together, as layers want them."""
    return torch.empty_like(x_BHTD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def outputs_like(q_BHTD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Uninitialised output, and log-sum-exp [B, H, T] in float32 (float64 for float64)."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    return empty_tokens_first(q_BHTD), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=wide)


def gradients_like(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of q, k and v."""
    return empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)


def unit_stride(x: Tensor) -> Tensor:
    """The kernels read rows without gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


# A copy from the host waits for it. There are as many lists, of heads or their offsets, as kinds of layers.
@lru_cache(maxsize=256)
def kept_on_device(numbers: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers as a tensor that is made once."""
    # One that is first made under inference mode could not be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
