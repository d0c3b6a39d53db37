"""How fast block-sparse products can be on a GPU: the roofline of what goes through its L2 cache and its memory.

    limits = SparseLimits(dense=6e14, cache=6e12, memory=3e12, bytes_per_value=2)
    limits.efficiency(product)            # e: time of the dense product x density over that of the sparse one

A tile of the input serves one column of blocks only, so each active block makes the kernel read a tile of the input
anew: from the cache, which caps e at small blocks however fast the cores are. A tile of 128 tokens and blocks of b x b
values of s bytes read s (128 b + b^2) bytes for 256 b^2 FLOPs. The memory must at least give input and weights once and
take the output. The input gradient is the same with the widths exchanged; the weight gradient reads two tiles for each
block, and counts as they do. No product was measured on a GPU by us.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from megasparse.planning.workload import Product

TILE_TOKENS = 128
"""Tokens of a tile (kernels/block_sparse/tiles.py)."""


@dataclass(frozen=True)
class SparseLimits:
    """FLOPs and bytes a second; infinite: no limit is known."""

    dense: float
    """Of dense products: the cores are not faster for ours."""
    cache: float = inf
    memory: float = inf
    bytes_per_value: int = 2

    def efficiency(self, product: Product) -> float:
        """The largest possible e of a product, above 0 and at most 1."""
        (first, second), tokens, block = product.shape.widths, product.shape.tokens, product.shape.block_size
        weights = first * second * product.density
        flops = 2 * tokens * weights
        through_cache = weights / block**2 * tokens * self.bytes_per_value * (block + block**2 / TILE_TOKENS)
        through_memory = self.bytes_per_value * (tokens * (first + second) + weights)
        seconds = max(flops / self.dense, through_cache / self.cache, through_memory / self.memory)
        return flops / self.dense / seconds
