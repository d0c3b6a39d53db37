"""Section `attention`: the patterns against flash and cuDNN attention, forward alone and with the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.gpu_check.context import Context
from megasparse.kernels.hybrid_attention import active_entries, hybrid_attention

LENGTHS = (8192, 1024, 32768)
TOKENS, HEADS, STRIDE = 32768, 16, 128
"""So many tokens at every length, in fewer sequences where they are longer."""
HEAD_DIMS = (64, 128)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(context: Context) -> None:
    cases = [(length, head_dim) for head_dim in head_dims(context) for length in lengths(context)]
    for length, head_dim in context.in_time(cases, "attention"):
        for name, pattern, attend in contenders(context, length):
            settings = {"tokens": length, "head_dim": head_dim, "kernel": name, "pattern": pattern}
            try:
                numbers = measure(context, attend, pattern, length, head_dim)
            except RuntimeError as error:
                # Not every version has every backend for every shape.
                context.row("attention", settings, note=f"{type(error).__name__}: {error}"[:200])
            else:
                context.row("attention", settings, numbers)


def lengths(context: Context) -> tuple[int, ...]:
    return (9,) if context.rehearse else LENGTHS


def head_dims(context: Context) -> tuple[int, ...]:
    return (16,) if context.rehearse else HEAD_DIMS


def contenders(context: Context, length: int) -> list[tuple[str, str, Attend]]:
    """Name of the kernel, its pattern and the function."""
    from torch.nn.attention import SDPBackend

    dense = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    if context.rehearse:  # the CPU has its own flash attention, and no cuDNN
        dense = {"flash": "FLASH_ATTENTION"}
    found: list[tuple[str, str, Attend]] = [
        (name, "full", partial(_dense, getattr(SDPBackend, backend)))
        for name, backend in dense.items()
        if hasattr(SDPBackend, backend)
    ]
    patterns = ("sparse",) if context.rehearse else ("sparse", "fixed", "local", "strided")
    stride = 8 if context.rehearse else STRIDE
    return found + [("megasparse", pattern, partial(_ours, pattern, stride)) for pattern in patterns]


def measure(context: Context, attend: Attend, pattern: str, length: int, head_dim: int) -> dict[str, float]:
    q, k, v, dy = inputs(context, length, head_dim)
    forward = context.clock.times(lambda: attend(q.detach(), k.detach(), v.detach()))
    both = context.clock.times(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dy))
    stride = 8 if context.rehearse else STRIDE
    entries = active_entries(pattern, length, stride) * q.shape[0] * q.shape[1]
    return {
        "forward_seconds": forward.device,
        "both_seconds": both.device,
        "host_seconds": both.host,
        # Two products of scores forward, five more backward.
        "forward_flops_per_second": 4 * entries * head_dim / forward.device,
        "both_flops_per_second": 14 * entries * head_dim / both.device,
    }


def inputs(context: Context, length: int, head_dim: int) -> tuple[Tensor, ...]:
    """q, k, v that require gradients, and dy; heads of a token lie together."""
    samples, heads = (1, 1) if context.rehearse else (TOKENS // length, HEADS)
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    shape = samples, length, heads, head_dim
    made = (torch.randn(shape, device=context.device).to(dtype).transpose(1, 2) for _ in range(4))
    *leaves, dy = made
    return *(leaf.requires_grad_() for leaf in leaves), dy


def launches(context: Context) -> list[tuple[str, Callable[[], Any]]]:
    """One pass of every pattern and length, with its variant: for `compiling`."""
    return [
        (f"speed: attention {pattern}, heads of {head_dim}", partial(_launch, context, attend, length, head_dim))
        for head_dim in head_dims(context)
        for length in lengths(context)
        for name, pattern, attend in contenders(context, length)
        if name == "megasparse"
    ]


def _launch(context: Context, attend: Attend, length: int, head_dim: int) -> None:
    q, k, v, dy = inputs(context, length, head_dim)
    torch.autograd.grad(attend(q, k, v), (q, k, v), dy)


def _dense(backend: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ours(pattern: str, stride: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return hybrid_attention(q, k, v, pattern, stride, "triton")
