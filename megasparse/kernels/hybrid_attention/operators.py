"""Hybrid sparse attention by one of the fast backends, as a differentiable function over two custom operators.

A backend is a module with two functions, which fill what they are given:

    forward(out, lse, q, k, v, heads)                               the output and its log-sum-exp, in units of its own
    backward((dq, dk, dv), dout, q, k, v, out, lse, heads)          the gradients

torch.compile sees two opaque calls with known output shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels.hybrid_attention import cpu, gpu, tiled
from megasparse.kernels.hybrid_attention.heads import Heads, gradients_like, outputs_like

BACKENDS: dict[str, Any] = {"tiled": tiled, "cpu": cpu, "triton": gpu}
PATTERNS = cpu.PATTERNS
"""Those that all backends compute."""


def attend(
    backend: str,
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    patterns: Sequence[str],
    stride: int,
    documents_BT: Tensor | None,
    offsets: Sequence[int],
) -> Tensor:
    """Softmax attention, [B, H, T, D] in the dtype of `q_BHTD`. See `Heads`; pattern and offset of each query head."""
    k_BGTD, v_BGTD = k_BGTD.to(q_BHTD.dtype), v_BGTD.to(q_BHTD.dtype)
    settings = [PATTERNS.index(name) for name in patterns], stride, list(offsets), backend
    return _Attention.apply(q_BHTD, k_BGTD, v_BGTD, documents_BT, *settings)


class _Attention(torch.autograd.Function):
    """Saves the joined output and its log-sum-exp, from which the backward pass has the weights."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, *settings: Any) -> Tensor:
        out, lse = attention_forward(q, k, v, documents, *settings)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
        return (*gradients, None, *(None for _ in ctx.settings))


@torch.library.custom_op("megasparse::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    patterns: list[int],
    stride: int,
    offsets: list[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp. patterns: of the query heads, as indices in PATTERNS."""
    out, lse = outputs_like(q)
    if q.numel():
        BACKENDS[backend].forward(out, lse, q, k, v, _heads(patterns, stride, offsets, documents))
    return out, lse


@torch.library.custom_op("megasparse::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    patterns: list[int],
    stride: int,
    offsets: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values."""
    gradients = gradients_like(dout, q, k, v)
    if q.numel():
        heads = _heads(patterns, stride, offsets, documents)
        BACKENDS[backend].backward(gradients, dout, q, k, v, out, lse, heads)
    return gradients


attention_forward.register_fake(outputs_like)
attention_backward.register_fake(gradients_like)


def _heads(patterns: list[int], stride: int, offsets: list[int], documents: Tensor | None) -> Heads:
    return Heads([PATTERNS[number] for number in patterns], stride, offsets, documents)
