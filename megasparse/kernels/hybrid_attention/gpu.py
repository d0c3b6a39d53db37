"""Hybrid sparse attention on GPUs by Triton kernels, float32, bfloat16 and float16, heads of up to 128.

Forward and backward pass are two custom operators (`operators.py`). Everything that is launched depends on shapes only:
nothing waits for the device, and CUDA graphs can capture it. No mask is made; per-token memory is the log-sum-exp, and
float32 sums where a pattern takes two launches. Triton is imported on first use.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, slowly, for tests: float32 only.

Tensor names: B samples, H query heads, G key-value heads, T tokens, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.common import triton_device
from megasparse.kernels.common.compiling import constant_when_compiled
from megasparse.kernels.hybrid_attention import gpu_tiles
from megasparse.kernels.hybrid_attention.gpu_tiles import Launch, Tile, executed_entries, launches, width
from megasparse.kernels.hybrid_attention.operators import (
    Attention,
    gradients_like,
    kept_on_device,
    outputs_like,
    unit_stride,
)
from megasparse.kernels.hybrid_attention.patterns import PATTERNS as ALL_PATTERNS

__all__ = ["attend", "executed_entries", "why_not"]

PATTERNS = ("full", "local", "strided", "sparse", "fixed")
MAX_HEAD_DIM = 128


# The compiler takes the answer as a constant: the environment is nothing that it could trace.
@constant_when_compiled
def why_not(device: str, dtype: torch.dtype, head_dim: int, planned: bool = False) -> str | None:
    """Why these kernels cannot run on a device type with a dtype and a head dimension; None where they can.

    Where torch finds no GPU, `cuda` is the device of a plan and taken to be suited.
    """
    reason = triton_device.wrong_type(device, dtype)
    if reason is None and head_dim > MAX_HEAD_DIM:
        reason = f"head_dim {head_dim}; supported: up to {MAX_HEAD_DIM}"
    if reason is None and device == "cuda" and torch.cuda.is_available():
        reason = triton_device.unsuited_device()
    return reason or triton_device.missing_triton()


def attend(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    pattern: str,
    stride: int,
    documents_BT: Tensor | None = None,
    offset: int | Sequence[int] = 0,
) -> Tensor:
    """Softmax attention of all heads under one pattern. Returns [B, H, T, D] in the dtype of `q_BHTD`.

    offset: one for all query heads, or one for each.
    """
    offsets = [offset] * q_BHTD.shape[1] if isinstance(offset, int) else list(offset)
    if pattern == "full":
        stride = 1
    if not ALL_PATTERNS[pattern].has_offset or not any(offsets):
        offsets = []
    operators = triton_attention_forward, triton_attention_backward
    return Attention.apply(operators, q_BHTD, k_BGTD, v_BGTD, documents_BT, offsets, pattern, stride)


@torch.library.custom_op("megasparse::triton_attention_forward", mutates_args=())
def triton_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, offsets: list[int], pattern: str, stride: int
) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp in units of log2, [B, H, T] in float32. `offsets`: one for each head, or none."""
    out, lse = outputs_like(q)
    if not q.numel():
        return out, lse
    call, previous = _Call((q, k, v), documents, offsets, stride), None
    steps = launches(pattern, q.shape[2], stride)
    for launch in steps:
        target = out if launch is steps[-1] else _float32_like(out)
        tile = call.tile(gpu_tiles.forward_tile, launch)
        num_tiles = call.count_tiles(launch, tile.queries)
        call.run(_kernels().forward_kernel, launch, tile, num_tiles, (target, previous, lse, call.starts))
        previous = target
    return out, lse


triton_attention_forward.register_fake(outputs_like)


@torch.library.custom_op("megasparse::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    offsets: list[int],
    pattern: str,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = gradients_like(dout, q, k, v)
    if not q.numel():
        return tuple(x.zero_() for x in gradients)
    call = _Call((q, k, v, dout), documents, offsets, stride)
    steps, previous = launches(pattern, q.shape[2], stride), (None, None, None)
    # delta = sum(dO O) is written by the first launch of the queries' gradient.
    out, delta = _tokens_first(out), torch.empty_like(lse)
    for launch in steps:
        targets = gradients if launch is steps[-1] else tuple(map(_float32_like, gradients))
        tile = call.tile(gpu_tiles.query_gradient_tile, launch)
        pointers = out, call.tensors[3], targets[0], previous[0], lse, delta, call.starts
        num_tiles = call.count_tiles(launch, tile.queries)
        call.run(_kernels().query_gradient_kernel, launch, tile, num_tiles, pointers)
        _key_gradients(call, launch, (lse, delta), targets[1:], previous[1:])
        previous = targets
    return gradients


triton_attention_backward.register_fake(gradients_like)


def _key_gradients(
    call: _Call,
    launch: Launch,
    rows: tuple[Tensor, Tensor],
    targets: tuple[Tensor, ...],
    previous: tuple[Tensor | None, ...],
) -> None:
    """Fill `targets`, the gradients of keys and values. rows: log-sum-exp and delta."""
    q, k, _, dout = call.tensors
    share = q.shape[1] // k.shape[1]
    # Heads with offsets of their own have summary keys of their own: such a group is summed afterwards.
    apart = launch.far == "summaries" and call.offsets is not None and share > 1
    results = [_float32_like(q) for _ in targets] if apart else targets
    tile = call.tile(gpu_tiles.key_gradient_tile, launch)
    num_tiles = call.count_tiles(launch, tile.keys)
    if launch.far == "summaries":
        num_tiles += -(-call.class_length // tile.keys)
    pointers = dout, *results, *previous, *rows, call.starts, call.ends
    call.run(_kernels().key_gradient_kernel, launch, tile, num_tiles, pointers, HEADS=1 if apart else share)
    if apart:
        for target, result in zip(targets, results, strict=True):
            target.copy_(result.unflatten(1, (-1, share)).sum(2))


class _Call:
    """What all launches of a forward or backward pass have in common.

    tensors: queries, keys, values and, in the backward pass, the gradient of the output.
    """

    def __init__(self, tensors: Sequence[Tensor], documents: Tensor | None, offsets: list[int], stride: int) -> None:
        self.tensors = tuple(map(unit_stride, tensors))
        self.starts, self.ends = _document_bounds(documents)
        self.offsets = kept_on_device(tuple(offsets), torch.int32, tensors[0].device) if offsets else None
        self.stride = stride
        self.class_length = gpu_tiles.class_length(tensors[0].shape[2], stride)

    def tile(self, choose: Callable[..., Tile], launch: Launch) -> Tile:
        q = self.tensors[0]
        return choose(launch, self.class_length, q.dtype, q.shape[3], torch.version.hip is not None)

    def count_tiles(self, launch: Launch, size: int) -> int:
        """Tiles of `size` tokens over a sequence."""
        if launch.far == "residues":
            return self.stride * -(-self.class_length // size)
        return -(-self.tensors[0].shape[2] // size)

    def run(
        self,
        kernel: Any,
        launch: Launch,
        tile: Tile,
        num_tiles: int,
        pointers: tuple[Tensor | None, ...],
        **constants: int,
    ) -> None:
        """One launch. pointers: between those of the inputs and that of the offsets."""
        q, k, v = self.tensors[:3]
        B, H, T, D = q.shape
        with triton_device.current(q.device):
            kernel[(num_tiles * B * (H // constants.get("HEADS", 1)),)](
                *(q, k, v, *pointers, self.offsets),
                *(T, self.stride, num_tiles, H, H // k.shape[1], 1 / math.sqrt(D)),
                *(x.stride()[:3] for x in self.tensors),
                **constants,
                NEAR=launch.near,
                FAR=launch.far,
                BEYOND=launch.beyond,
                QUERIES=tile.queries,
                KEYS=tile.keys,
                CHUNK=tile.chunk,
                HEAD_DIM=D,
                WIDTH=width(D),
                PRECISION=triton_device.precision(q.dtype),
                num_warps=tile.warps,
                num_stages=tile.stages,
            )


def _document_bounds(documents_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """First token of each token's document, and one more than its last one, in int32."""
    if documents_BT is None:
        return None, None
    rows = documents_BT.contiguous()
    return torch.searchsorted(rows, rows, out_int32=True), torch.searchsorted(rows, rows, out_int32=True, right=True)


def _float32_like(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D, dtype=torch.float32).transpose(1, 2)


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@cache
def _kernels() -> SimpleNamespace:
    from megasparse.kernels.hybrid_attention import triton_kernels, triton_key_gradient, triton_query_gradient

    return SimpleNamespace(
        forward_kernel=triton_kernels.forward_kernel,
        query_gradient_kernel=triton_query_gradient.query_gradient_kernel,
        key_gradient_kernel=triton_key_gradient.key_gradient_kernel,
    )
