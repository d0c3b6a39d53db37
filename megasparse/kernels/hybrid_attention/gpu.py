"""Hybrid sparse attention on GPUs by Triton kernels, float32, bfloat16 and float16, heads of up to 128.

``attend`` is an autograd function over two custom operators, so that torch.compile sees two opaque calls with known
output shapes. Everything that is launched depends on shapes only: nothing waits for the device, and CUDA graphs can
capture it. No mask is made; per-token memory is the log-sum-exp, and float32 sums where a pattern takes two launches.
Triton is imported on first use.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors, slowly, for tests: float32 only.

Tensor names: B samples, H query heads, G key-value heads, T tokens, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megasparse.kernels import triton_device
from megasparse.kernels.hybrid_attention import gpu_tiles
from megasparse.kernels.hybrid_attention.gpu_tiles import Launch, Tile, executed_entries, launches, width
from megasparse.kernels.hybrid_attention.patterns import PATTERNS as ALL_PATTERNS
from megasparse.kernels.hybrid_attention.tiled import empty_tokens_first

__all__ = ["attend", "executed_entries", "why_not"]

PATTERNS = ("full", "local", "strided", "sparse", "fixed")
MAX_HEAD_DIM = 128


# The compiler takes the answer as a constant: the environment is nothing that it could trace.
@torch.compiler.assume_constant_result
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
    scale: float | None,
    documents_BT: Tensor | None = None,
    offset: int | Sequence[int] = 0,
) -> Tensor:
    """Softmax attention of all heads under one pattern. Returns [B, H, T, D] in the dtype of `q_BHTD`.

    offset: one for all query heads, or one for each.
    """
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    offsets = [offset] * q_BHTD.shape[1] if isinstance(offset, int) else list(offset)
    if pattern == "full":
        stride = 1
    if not ALL_PATTERNS[pattern].has_offset or not any(offsets):
        offsets = []
    return _Attention.apply(q_BHTD, k_BGTD, v_BGTD, documents_BT, offsets, pattern, stride, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> Tensor:
        documents, *ctx.settings = settings
        out, lse = triton_attention_forward(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, lse, documents)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = triton_attention_backward(dout, *ctx.saved_tensors, *ctx.settings)
        return (*gradients, None, None, None, None, None)


@torch.library.custom_op("megasparse::triton_attention_forward", mutates_args=())
def triton_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    offsets: list[int],
    pattern: str,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp in units of log2, [B, H, T] in float32. `offsets`: one for each head, or none."""
    out, lse = empty_tokens_first(q), _rows_of(q)
    if not q.numel():
        return out, lse
    q, k, v = map(_unit_stride, (q, k, v))
    starts, _ = _document_bounds(documents)
    steps, previous = launches(pattern, q.shape[2], stride), None
    for launch in steps:
        tile = _tile(gpu_tiles.forward_tile, launch, q, stride)
        target = out if launch is steps[-1] else _float32_like(out)
        num_tiles = _count_tiles(launch, tile.queries, q.shape[2], stride)
        with triton_device.current(q.device):
            _kernels().forward_kernel[(num_tiles * q.shape[0] * q.shape[1],)](
                *(q, k, v, target, previous, lse, starts, _offsets_H(offsets, q)),
                *(q.shape[2], stride, num_tiles, q.shape[1], q.shape[1] // k.shape[1], scale),
                *(x.stride()[:3] for x in (q, k, v)),
                **_constants(launch, tile, q),
            )
        previous = target
    return out, lse


@triton_attention_forward.register_fake
def _(q, k, v, documents, offsets, pattern, stride, scale):
    return empty_tokens_first(q), _rows_of(q)


@torch.library.custom_op("megasparse::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor | None,
    offsets: list[int],
    pattern: str,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    gradients = [empty_tokens_first(x) for x in (q, k, v)]
    if not q.numel():
        return tuple(x.zero_() for x in gradients)
    dout, q, k, v = map(_unit_stride, (dout, q, k, v))
    bounds, steps = _document_bounds(documents), launches(pattern, q.shape[2], stride)
    rows = _tokens_first(out), lse, torch.empty_like(lse)
    previous: list[Tensor | None] = [None] * 3
    for launch in steps:
        final = launch is steps[-1]
        targets = gradients if final else [_float32_like(x) for x in gradients]
        inputs = launch, dout, q, k, v, rows, bounds, _offsets_H(offsets, q), stride, scale
        _query_gradient(*inputs, targets[0], previous[0])
        _key_gradients(*inputs, targets[1:], previous[1:])
        previous = targets
    return tuple(gradients)


@triton_attention_backward.register_fake
def _(dout, q, k, v, out, lse, documents, offsets, pattern, stride, scale):
    return empty_tokens_first(q), empty_tokens_first(k), empty_tokens_first(v)


def _query_gradient(
    launch: Launch,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor | None, Tensor | None],
    offsets: Tensor | None,
    stride: int,
    scale: float,
    target: Tensor,
    previous: Tensor | None,
) -> None:
    """Fill `target`, and on the first launch the last of `rows`, which are output, log-sum-exp and delta."""
    tile = _tile(gpu_tiles.query_gradient_tile, launch, q, stride)
    num_tiles = _count_tiles(launch, tile.queries, q.shape[2], stride)
    out, lse, delta = rows
    with triton_device.current(q.device):
        _kernels().query_gradient_kernel[(num_tiles * q.shape[0] * q.shape[1],)](
            *(q, k, v, out, dout, target, previous, lse, delta, bounds[0], offsets),
            *(q.shape[2], stride, num_tiles, q.shape[1], q.shape[1] // k.shape[1], scale),
            *(x.stride()[:3] for x in (q, k, v, dout)),
            **_constants(launch, tile, q),
        )


def _key_gradients(
    launch: Launch,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    bounds: tuple[Tensor | None, Tensor | None],
    offsets: Tensor | None,
    stride: int,
    scale: float,
    targets: list[Tensor],
    previous: list[Tensor | None],
) -> None:
    """Fill `targets`, the gradients of keys and values."""
    num_heads, share = q.shape[1], q.shape[1] // k.shape[1]
    # Heads with offsets of their own have summary keys of their own: such a group is summed afterwards.
    apart = launch.far == "summaries" and offsets is not None and share > 1
    results = [_float32_like(q) for _ in targets] if apart else targets
    tile = _tile(gpu_tiles.key_gradient_tile, launch, q, stride)
    num_tiles = _count_tiles(launch, tile.keys, q.shape[2], stride)
    if launch.far == "summaries":
        num_tiles += -(-gpu_tiles.class_length(q.shape[2], stride) // tile.keys)
    heads = 1 if apart else share
    with triton_device.current(q.device):
        _kernels().key_gradient_kernel[(num_tiles * q.shape[0] * (num_heads // heads),)](
            *(q, k, v, dout, *results, *previous, *rows[1:], *bounds, offsets),
            *(q.shape[2], stride, num_tiles, num_heads, share, scale),
            *(x.stride()[:3] for x in (q, k, v, dout)),
            HEADS=heads,
            **_constants(launch, tile, q),
        )
    if apart:
        for target, result in zip(targets, results, strict=True):
            target.copy_(result.unflatten(1, (-1, share)).sum(2))


def _constants(launch: Launch, tile: Tile, q: Tensor) -> dict[str, Any]:
    return {
        "NEAR": launch.near,
        "FAR": launch.far,
        "BEYOND": launch.beyond,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "CHUNK": tile.chunk,
        "HEAD_DIM": q.shape[3],
        "WIDTH": width(q.shape[3]),
        "PRECISION": triton_device.precision(q.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _tile(choose: Callable[..., Tile], launch: Launch, q: Tensor, stride: int) -> Tile:
    length = gpu_tiles.class_length(q.shape[2], stride)
    return choose(launch, length, q.dtype, q.shape[3], torch.version.hip is not None)


def _count_tiles(launch: Launch, size: int, seq_length: int, stride: int) -> int:
    if launch.far == "residues":
        return stride * -(-gpu_tiles.class_length(seq_length, stride) // size)
    return -(-seq_length // size)


def _document_bounds(documents_BT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """First token of each token's document, and one more than its last one, in int32."""
    if documents_BT is None:
        return None, None
    rows = documents_BT.contiguous()
    return torch.searchsorted(rows, rows, out_int32=True), torch.searchsorted(rows, rows, out_int32=True, right=True)


def _offsets_H(offsets: list[int], q: Tensor) -> Tensor | None:
    return _on_device(tuple(offsets), q.device) if offsets else None


# A copy from the host waits for it; there are as many offsets as kinds of layers.
@lru_cache(maxsize=256)
def _on_device(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(offsets, dtype=torch.int32, device=device)


def _rows_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _float32_like(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D, dtype=torch.float32).transpose(1, 2)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


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
