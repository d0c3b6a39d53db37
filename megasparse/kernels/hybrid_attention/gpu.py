"""Hybrid sparse attention on GPUs by Triton kernels, float32, bfloat16 and float16, heads of up to 128.

Everything that is launched depends on shapes only: nothing waits for the device, and CUDA graphs can capture it. No
mask is made; per-token memory is the log-sum-exp, and float32 sums where a pattern takes two launches. Triton is
imported on first use.

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
from megasparse.kernels.hybrid_attention.gpu_tiles import Launch, Tile, executed_entries, width
from megasparse.kernels.hybrid_attention.heads import Heads, kept_on_device, unit_stride

__all__ = ["backward", "executed_entries", "forward", "why_not"]

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


def forward(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> None:
    """See `operators.py`; all heads have one pattern. The log-sum-exp is in units of log2."""
    call, previous = _Call((q, k, v), heads), None
    for launch in call.launches:
        target = out if launch is call.launches[-1] else _float32_like(out)
        pointers = target, previous, lse, call.starts
        call.run(_kernels().forward_kernel, gpu_tiles.forward_tile, launch, pointers)
        previous = target


def backward(
    gradients: tuple[Tensor, ...], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: Heads
) -> None:
    """See `operators.py`."""
    call, previous = _Call((q, k, v, dout), heads), (None, None, None)
    # delta = sum(dO O) is written by the first launch of the queries' gradient.
    out, delta = out.transpose(1, 2).contiguous().transpose(1, 2), torch.empty_like(lse)
    for launch in call.launches:
        targets = gradients if launch is call.launches[-1] else tuple(map(_float32_like, gradients))
        pointers = out, call.tensors[3], targets[0], previous[0], lse, delta, call.starts
        call.run(_kernels().query_gradient_kernel, gpu_tiles.query_gradient_tile, launch, pointers)
        _key_gradients(call, launch, (lse, delta), targets[1:], previous[1:])
        previous = targets


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
    pointers = dout, *results, *previous, *rows, call.starts, call.ends
    together = 1 if apart else share
    call.run(_kernels().key_gradient_kernel, gpu_tiles.key_gradient_tile, launch, pointers, together)
    if apart:
        for target, result in zip(targets, results, strict=True):
            target.copy_(result.unflatten(1, (-1, share)).sum(2))


class _Call:
    """What all launches of a forward or backward pass have in common.

    tensors: queries, keys, values and, in the backward pass, the gradient of the output.
    """

    def __init__(self, tensors: Sequence[Tensor], heads: Heads) -> None:
        self.tensors = tuple(map(unit_stride, tensors))
        q, self.stride = self.tensors[0], 1 if heads.pattern == "full" else heads.stride
        self.starts, self.ends = heads.document_bounds()
        self.offsets = kept_on_device(tuple(heads.offsets), torch.int32, q.device) if any(heads.offsets) else None
        self.launches = gpu_tiles.launches(heads.pattern, q.shape[2], self.stride)
        self.class_length = gpu_tiles.class_length(q.shape[2], self.stride)

    def run(
        self,
        kernel: Any,
        choose: Callable[..., Tile],
        launch: Launch,
        pointers: tuple[Tensor | None, ...],
        together: int | None = None,
    ) -> None:
        """One launch. pointers: between those of the inputs and that of the offsets.

        together: a program has a tile of keys, and so many query heads; None: a tile of queries of one head.
        """
        q, k, v = self.tensors[:3]
        B, H, T, D = q.shape
        tile = choose(launch, self.class_length, q.dtype, D, torch.version.hip is not None)
        side = tile.queries if together is None else tile.keys
        of_class = -(-self.class_length // side)
        num_tiles = self.stride * of_class if launch.far == "residues" else -(-T // side)
        if together is not None and launch.far == "summaries":
            num_tiles += of_class
        with triton_device.current(q.device):
            kernel[(num_tiles * B * (H // (together or 1)),)](
                *(q, k, v, *pointers, self.offsets),
                *(T, self.stride, num_tiles, H, H // k.shape[1], 1 / math.sqrt(D)),
                *(x.stride()[:3] for x in self.tensors),
                **({} if together is None else {"HEADS": together}),
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


def _float32_like(x: Tensor) -> Tensor:
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D, dtype=torch.float32).transpose(1, 2)


@cache
def _kernels() -> SimpleNamespace:
    from megasparse.kernels.hybrid_attention import triton_kernels, triton_key_gradient

    return SimpleNamespace(
        forward_kernel=triton_kernels.forward_kernel,
        query_gradient_kernel=triton_kernels.query_gradient_kernel,
        key_gradient_kernel=triton_key_gradient.key_gradient_kernel,
    )
