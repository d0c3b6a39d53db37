"""A kernel's forward and backward pass, which are custom operators, as one differentiable function.

torch.compile sees two opaque calls with known output shapes. ``outputs_like`` and ``gradients_like`` make uninitialised
outputs from what the operators take: for the operators themselves, and as their fakes.

Tensor names: B samples, H heads, T tokens, D head dimension.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Attention(torch.autograd.Function):
    """Saves the joined output and its log-sum-exp, from which the backward pass has the weights.

    Applied to the two operators, (q, k, v, documents, *settings) -> (output, log-sum-exp) and
    (dout, q, k, v, documents, output, log-sum-exp, *settings) -> (dq, dk, dv), then to what the first one takes.
    """

    @staticmethod
    def forward(
        ctx: Any, operators: tuple, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, *settings: Any
    ) -> Tensor:
        attend, ctx.differentiate = operators
        out, lse = attend(q, k, v, documents, *settings)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.differentiate(dout, *ctx.saved_tensors, *ctx.settings)
        return (None, *gradients, None, *(None for _ in ctx.settings))


def empty_tokens_first(x_BHTD: Tensor) -> Tensor:
    """Uninitialised memory for a tensor like this one whose heads of a token lie together, as layers want them."""
    return torch.empty_like(x_BHTD.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def outputs_like(q_BHTD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [B, H, T], which is float32."""
    return empty_tokens_first(q_BHTD), q_BHTD.new_empty(q_BHTD.shape[:3], dtype=torch.float32)


def gradients_like(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
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
