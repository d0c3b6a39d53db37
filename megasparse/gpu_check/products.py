"""Section `products`: the block-sparse products of two models' layers, on the device and on the host.

Useful work is 2 x tokens x active weights. The efficiency e is useful FLOP/s over those of cuBLAS for the same layer
and product; `cap` is the largest e that traffic allows: no faster than the dense product at the density, nor than main
memory gives every operand once, nor than the L2 cache gives every tile as often as the kernel reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megasparse.gpu_check.context import Context
from megasparse.gpu_check.facts import Layer, ceiling, dense_products, dense_rate, layers, operands
from megasparse.kernels.block_sparse import gpu, tile_cache
from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.measure import random_layer
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, Tile

DENSITIES = (0.1, 0.05, 0.5, 0.2)
"""The most telling first."""
BLOCKS = {"gpt2-xl": 64, "llama-7b": 128, "tiny": 16}
"""The largest that divide the widths."""


def run(context: Context) -> None:
    densities = (0.5,) if context.rehearse else DENSITIES
    cases = [(layer, density) for density in densities for layer in layers(context.rehearse)]
    for layer, density in context.in_time(cases, "products"):
        made = SparseProducts(context, layer, density)
        for name, run_product in made.products().items():
            dense = dense_rate(context, layer, name) or made.dense_rate(name)
            times = context.clock.times(run_product)
            useful, bytes_once = made.useful_flops, made.bytes_once(name)
            numbers = {
                "device_seconds": times.device,
                "host_seconds": times.host,
                "flops_per_second": useful / times.device,
                "efficiency": useful / times.device / dense,
                "cap": made.cap(name, dense),
                "bytes_per_second": bytes_once / times.device,
                "dense_flops_per_second": dense,
            }
            context.row("product", made.case(name), numbers)


def launches(context: Context) -> list[tuple[str, Callable[[], Any]]]:
    """One launch for every layer and product, with its variant: for `compiling`."""
    return [
        (f"speed: {name}, blocks of {BLOCKS[layer[0]]}", partial(_launch, context, layer, name))
        for layer in layers(context.rehearse)
        for name in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
    ]


def _launch(context: Context, layer: Layer, name: str) -> None:
    for density in (0.5,) if context.rehearse else DENSITIES:
        SparseProducts(context, layer, density).products()[name]()


class SparseProducts:
    """A layer with random active blocks, its three products, and their least traffic."""

    def __init__(self, context: Context, layer: Layer, density: float) -> None:
        self.context, self.layer = context, layer
        (self.inner, self.outer), self.tokens = layer[1:]
        self.block = BLOCKS[layer[0]]
        torch.manual_seed(0)
        self.x, self.dense_weight, self.dy = operands(context, layer)
        self.weight, self.index = random_layer(self.dense_weight, self.block, density, torch.Generator().manual_seed(0))

    def case(self, name: str) -> dict[str, Any]:
        widths = {"model": self.layer[0], "in": self.inner, "out": self.outer, "tokens": self.tokens}
        return widths | {"block": self.block, "density": round(self.index.density, 4), "product": name}

    def products(self) -> dict[str, Callable[[], Tensor]]:
        return {
            FORWARD: lambda: gpu.forward(self.x, self.weight, None, self.index),
            INPUT_GRADIENT: lambda: gpu.input_gradient(self.dy, self.weight, self.index),
            WEIGHT_GRADIENT: lambda: gpu.weight_gradient(self.dy, self.x, self.index),
        }

    def dense_rate(self, name: str) -> float:
        """FLOP/s of the dense product, measured here."""
        run_dense = dense_products(self.x, self.dense_weight, self.dy)[name]
        return 2 * self.tokens * self.inner * self.outer / self.context.clock.times(run_dense).device

    @property
    def useful_flops(self) -> float:
        return 2.0 * self.tokens * self.index.num_active * self.block**2

    def bytes_once(self, name: str) -> float:
        """Every operand once: both sides of the tokens, and the active weights or the whole weight gradient."""
        sides = self.tokens * (self.inner + self.outer)
        weights = self.inner * self.outer if name == WEIGHT_GRADIENT else self.index.num_active * self.block**2
        return float(self.x.element_size() * (sides + weights))

    def cap(self, name: str, dense: float) -> float | None:
        """The largest possible efficiency; None where the bandwidths were not measured."""
        copy, cache = ceiling(self.context, "copy"), ceiling(self.context, "l2")
        if copy is None or cache is None:
            return None
        ideal = self.useful_flops / dense
        tile = tile_of(name, self.x, self.index)
        return ideal / max(ideal, self.bytes_once(name) / copy, self._tile_bytes(name, tile) / cache)

    def _tile_bytes(self, name: str, tile: Tile) -> float:
        """What all programs read, each tile as often as it is read."""
        active, block, size = self.index.num_active, self.block, self.x.element_size()
        if name == WEIGHT_GRADIENT:
            programs = gpu.gradient_programs(tile, block, self.index.mask.shape[0], active)
            # Rows of dy for each program, columns of x for each active block.
            return float(size * self.tokens * (programs * tile.rows + active * block * block // tile.rows))
        token_tiles, column_tiles = -(-self.tokens // tile.rows), block // tile.columns
        return float(size * active * block * (self.tokens * column_tiles + token_tiles * block))


def tile_of(name: str, x: Tensor, index: BlockIndex) -> Tile:
    """The tile that a product runs with."""
    groups = index.mask.shape[1 if name == INPUT_GRADIENT else 0]
    return tile_cache.tile_for(gpu.problem(name, x, index.block_size, groups, index.num_active))
