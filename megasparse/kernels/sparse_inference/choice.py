"""Which layout fits a weight: whole blocks of zeros, single zeros, or too few of either.

BREAK_EVEN holds the densities up to which packed products are taken. With one row of x and two threads of an EPYC that
has AVX2 alone (benchmarks/results, sparse_decoding, 2026-11-28; 400 MB of float32), at 0.5 single zeros are 1.7 times
as fast as dense float32 and 1.2 times as dense bfloat16, blocks 2.0 and 1.8 times; above 0.5 nothing was measured. Int8
with single zeros has 0.8 of the speed of dense int8 there, at any density; it is taken for its memory, that of the
values and one bit a weight. benchmarks/sparse_decoding.py finds where they meet on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("dense", "unstructured", "blocks")
BLOCK_SIZES = (4, 8, 16, 32, 64)
WASTE = 0.02
"""Zeros that blocks may hold, of their weights: a few weights are 0 by chance."""

BREAK_EVEN = {
    "unstructured": dict.fromkeys((torch.float32, torch.bfloat16, torch.int8), 0.6),
    "blocks": dict.fromkeys((torch.float32, torch.bfloat16, torch.int8), 0.7),
}


@dataclass(frozen=True)
class Choice:
    """A layout of ``compressed``; the side of its blocks is 1 where there are none."""

    kind: str
    block_size: int = 1


def choose(weight_OI: Tensor, kind: str = "auto", block_size: int | None = None) -> Choice:
    """`auto`: blocks where the zeros are whole blocks, else unstructured, and dense above the break-even density.

    With `blocks` and without a size: the largest one that fits, else the one that stores the fewest weights. Raises
    ValueError where no block divides the matrix.
    """
    if kind in ("dense", "unstructured"):
        return Choice(kind)
    if kind == "blocks" and block_size is not None:
        return Choice(kind, block_size)
    stored = _stored_in_blocks(weight_OI)
    num_active = int((weight_OI != 0).sum())
    fitting = [size for size, count in stored.items() if count * (1 - WASTE) <= num_active]
    if kind == "blocks":
        if not stored:
            raise ValueError(f"kind: blocks of a weight {tuple(weight_OI.shape)}; no side of {BLOCK_SIZES} divides it")
        return Choice(kind, max(fitting, default=min(stored, key=stored.__getitem__)))
    density = num_active / max(weight_OI.numel(), 1)
    if fitting and density <= BREAK_EVEN["blocks"][weight_OI.dtype]:
        return Choice("blocks", max(fitting))
    return Choice("unstructured" if density <= BREAK_EVEN["unstructured"][weight_OI.dtype] else "dense")


def _stored_in_blocks(weight_OI: Tensor) -> dict[int, int]:
    """Weights that blocks of each side would hold, of those that divide the matrix."""
    outputs, inputs = weight_OI.shape
    sizes = [size for size in BLOCK_SIZES if outputs % size == 0 == inputs % size]
    found, mask, side = {}, weight_OI != 0, 1
    for size in sizes:
        step, side = size // side, size
        mask = mask.view(mask.shape[0] // step, step, mask.shape[1] // step, step).any(dim=3).any(dim=1)
        found[size] = int(mask.sum()) * size * size
    return found
