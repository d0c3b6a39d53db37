"""Tile sizes of the Triton kernels: one default for every block side and dtype, and the candidates for tuning.

A default is what runs until ``tuning`` has found something better on the device at hand. The defaults keep to the
shared memory and the registers of sm_80, sm_90 and gfx942 (tests compile them ahead of time); which of them are
fastest has been measured on no device yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from megasparse.kernels.common.triton_device import power_of_two

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"


@dataclass(frozen=True)
class Tile:
    """What one program computes: rows x columns of the output, `depth` summands in one step.

    | kernel                  | rows                         | columns                            | depth            |
    |-------------------------|------------------------------|------------------------------------|------------------|
    | forward, input gradient | tokens                       | features made, at most a block     | features summed  |
    | weight gradient         | weight rows, at most a block | weight columns                     | tokens           |

    Powers of two, at least 16. Where the depth (first two) or the columns (weight gradient) exceed the block, several
    active blocks are taken at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Steps whose loads are under way at once."""
    group: int = 8
    """Token tiles (forward, input gradient) that are worked through together, to stay in the L2 cache."""
    swapped: bool = False
    """Forward and input gradient are computed transposed: tokens are the long side of the tensor cores."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth", "warps", "stages", "group"):
            value = getattr(self, name)
            least = 16 if name in ("rows", "columns", "depth") else 1
            if not isinstance(value, int) or not least <= value <= 1024 or (name != "stages" and value & (value - 1)):
                raise ValueError(f"tile: {name} = {value!r}; must be one of powers of two from {least} to 1024")


def fits(tile: Tile, kernel: str, block_size: int) -> bool:
    """Whether the kernel can use the tile for blocks of side `block_size`."""
    return (tile.rows if kernel == WEIGHT_GRADIENT else tile.columns) <= block_size


def default_tile(kernel: str, block_size: int, dtype: torch.dtype, is_hip: bool = False) -> Tile:
    """The tile that is used where none was tuned."""
    if dtype == torch.float32:
        # Exact float32 has no tensor cores; operands lie in registers, so that steps are short.
        if kernel != WEIGHT_GRADIENT:
            return Tile(64, min(block_size, 64), 16, warps=4, stages=3 - is_hip)
        return Tile(min(block_size, 64), 64, 16, warps=4, stages=3 - is_hip)
    warps = 8 if block_size == 128 else 4
    # gfx942 has 64 KiB of shared memory, and hides latency by waves rather than by stages.
    stages = 2 if is_hip else 3
    if kernel != WEIGHT_GRADIENT:
        return Tile(128, block_size, 64, warps, stages)
    return Tile(block_size, 128, 64, warps, stages)


def swapped_tile(block_size: int) -> Tile:
    """256 tokens for each reading of a weight, computed transposed: on sm_90 one m64n256k16 product after the other.

    A step of blocks of 128 then reads 3/256 elements for each multiplication, against 4/256 with the default of 128
    tokens; blocks of 64 read 5/256 against 6/256. It is a candidate and no default: its registers leave room for one
    program per processor, with no other to work while it waits for its first blocks and stores its result.
    """
    # With 64 summands a program of four warps needs half of all registers, and sm_80 spills.
    return Tile(256, block_size, 64 if block_size == 128 else 32, 8 if block_size == 128 else 4, stages=3, swapped=True)


def candidates(kernel: str, block_size: int, dtype: torch.dtype, is_hip: bool = False) -> Iterator[Tile]:
    """Tiles worth measuring, the default first. Some may not fit a device; the compiler then says so."""
    default = default_tile(kernel, block_size, dtype, is_hip)
    yield default
    exact = dtype == torch.float32
    if kernel != WEIGHT_GRADIENT and block_size >= 64 and not exact and not is_hip:
        yield swapped_tile(block_size)
    sides, depths = ((32, 64, 128), (16, 32)) if exact else ((64, 128, 256), (32, 64))
    stages = (1, 2) if is_hip else (2, 3) if exact else (3, 4)
    inner = (block_size // 2, block_size) if block_size == 128 else (block_size,)
    for side, own, depth, warps, stage in product(sides, inner, depths, (4, 8), stages):
        rows, columns = (own, side) if kernel == WEIGHT_GRADIENT else (side, own)
        tile = replace(default, rows=rows, columns=columns, depth=depth, warps=warps, stages=stage)
        # Fewer than 8 sums for each of 32 threads leave too little work between two loads, more than 128 spill.
        if tile != default and 8 <= side * own // (warps * 32) <= 128:
            yield tile


def fitted(tile: Tile, kernel: str, block_size: int, tokens: int, active_per_row: float) -> Tile:
    """The tile, cut down for a small problem: few tokens, or few active blocks in a block row (`active_per_row`,
    mean)."""
    least = max(16, power_of_two(tokens))
    if kernel != WEIGHT_GRADIENT:
        return replace(tile, rows=min(tile.rows, least))
    columns = block_size * power_of_two(round(active_per_row))
    return replace(tile, columns=min(tile.columns, columns), depth=min(tile.depth, least))
