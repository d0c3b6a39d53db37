"""Tensors of more than 2^31 elements, where an offset in 32 bits would wrap around: the last rows are right.

A product's last tokens are compared with float64; the last head of an attention with the same head alone, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from megasparse.gpu_check.context import Context
from megasparse.gpu_check.product_numerics import bounded, excess, unequal
from megasparse.kernels.block_sparse import gpu
from megasparse.kernels.block_sparse.measure import random_layer
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from megasparse.kernels.hybrid_attention import hybrid_attention

WIDTH, BLOCK, HEADS, HEAD_DIM, STRIDE = 4096, 128, 32, 128, 128
TAIL = 300
"""Rows at the end that are compared."""

Compare = Callable[[Context, str, dict[str, Any], Callable[[], dict[str, float]]], None]


def run(context: Context, compare: Compare) -> None:
    """A row for each kernel, or one that says how much memory is missing."""
    rehearse = context.rehearse
    width, block, heads, head_dim = (32, 16, 2, 16) if rehearse else (WIDTH, BLOCK, HEADS, HEAD_DIM)
    # A few hundred rows beyond 2^31 elements, an odd count.
    tokens = 25 if rehearse else 2**31 // WIDTH + TAIL + 1
    length = 9 if rehearse else 2**31 // (HEADS * HEAD_DIM) + TAIL + 1
    dtype = torch.float32 if rehearse else torch.bfloat16
    size = torch.finfo(dtype).bits // 8
    # x, dy and the result with its twin; of attention q, k, v, dy, the output, three gradients and what they need.
    needs = {"product": 5 * tokens * width * size, "attention": 12 * length * heads * head_dim * size}
    works = {
        "product": [
            (name, partial(_product, name, context.device, dtype, (tokens, width, block)))
            for name in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
        ],
        "attention": [("local", partial(_attention, context.device, dtype, (length, heads, head_dim)))],
    }
    for kind, each in works.items():
        for name, work in each:
            elements = tokens * width if kind == "product" else length * heads * head_dim
            settings = {"kernel": f"{kind}, {name}", "elements": elements}
            free = _free_bytes(rehearse)
            if free < needs[kind]:
                context.row(
                    "large", settings, {"missing_bytes": needs[kind] - free}, note="too little memory: left out"
                )
                continue
            compare(context, "large", settings, work)


def _free_bytes(rehearse: bool) -> float:
    if rehearse:
        return float("inf")
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info()[0])


def _product(name: str, device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> dict[str, float]:
    tokens, width, block = sizes
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    dense_weight = torch.randn(width, width, device=device, dtype=dtype)
    weight, index = random_layer(dense_weight, block, 0.1, torch.Generator().manual_seed(0))
    rows = slice(-TAIL, None)
    if name == FORWARD:
        got, again = (gpu.forward(x, weight, None, index)[rows].clone() for _ in range(2))
        return excess(got, *bounded(x[rows].double(), weight.double().t(), dtype)) | unequal(got, again)
    if name == INPUT_GRADIENT:
        got, again = (gpu.input_gradient(x, weight, index)[rows].clone() for _ in range(2))
        return excess(got, *bounded(x[rows].double(), weight.double(), dtype)) | unequal(got, again)
    # Only the last rows are not zero: an offset that wraps around finds other ones.
    x[:-TAIL] = 0
    dy = x.roll(1, dims=1)
    got, again = (gpu.weight_gradient(dy, x, index) for _ in range(2))
    expected, bound = bounded(dy[rows].double().t(), x[rows].double(), dtype)
    keep = index.mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    # The split sums have more summands, all of them zero: the bound is that of the last rows.
    return excess(got, expected * keep, bound * keep) | unequal(got, again)


def _attention(device: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> dict[str, float]:
    length, heads, head_dim = sizes
    torch.manual_seed(0)
    shape = 1, length, heads, head_dim
    q, k, v, dy = (torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(4))
    together = _last_head(q, k, v, dy)
    alone = _last_head(*(x[:, -1:].clone() for x in (q, k, v, dy)))
    differing = sum(float((a != b).sum()) for a, b in zip(together, alone, strict=True))
    nan = any(bool(result.isnan().any()) for result in together)
    return {"error_over_bound": float("nan") if nan else 0.0, "unequal_bits": differing}


def _last_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    q, k, v, dy = (tensor.detach() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
    y = hybrid_attention(q, k, v, "local", STRIDE, "triton")
    return [result[:, -1].clone() for result in (y.detach(), *torch.autograd.grad(y, leaves, dy))]
