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

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input gradient", "weight gradient"


@dataclass(frozen=True)
class Tile:
    """What one program computes: rows x columns of the output, `depth` summands in one step.

    | kernel                  | rows                         | columns                            | depth            |
    |-------------------------|------------------------------|------------------------------------|------------------|
    | forward, input gradient | tokens                       | features made, at most a block     | features summed  |
    | weight gradient         | weight rows, at most a block | weight columns                     | tokens           |

    Powers of two, at least 16. Where the depth (first two) or the columns (weight gradient) exceed the block, several
    live blocks are taken at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    """Steps whose loads are under way at once."""
    group: int = 8
    """Token tiles (forward, input gradient) that are worked through together, to stay in the L2 cache."""

    def __post_init__(self) -> None:
        for name in ("rows", "columns", "depth", "warps", "stages", "group"):
            value = getattr(self, name)
            least = 16 if name in ("rows", "columns", "depth") else 1
            if not isinstance(value, int) or not least <= value <= 1024 or (name != "stages" and value & (value - 1)):
                raise ValueError(f"tile: {name} = {value!r}; legal values: powers of two from {least} to 1024")


def fits(tile: Tile, kernel: str, unit: int) -> bool:
    """Whether the kernel can use the tile for blocks of side `unit`."""
    return (tile.rows if kernel == WEIGHT_GRADIENT else tile.columns) <= unit


def default_tile(kernel: str, unit: int, dtype: torch.dtype, is_hip: bool = False) -> Tile:
    """The tile that is used where none was tuned."""
    if dtype == torch.float32:
        # Exact float32 has no tensor cores; operands live in registers, so that steps are short.
        if kernel != WEIGHT_GRADIENT:
            return Tile(64, min(unit, 64), 16, warps=4, stages=3 - is_hip)
        return Tile(min(unit, 64), 64, 16, warps=4, stages=3 - is_hip)
    warps = 8 if unit == 128 else 4
    # gfx942 has 64 KiB of shared memory, and hides latency by waves rather than by stages.
    stages = 2 if is_hip else 3
    if kernel != WEIGHT_GRADIENT:
        return Tile(128, unit, 64, warps, stages)
    return Tile(unit, 128, 64, warps, stages)


def candidates(kernel: str, unit: int, dtype: torch.dtype, is_hip: bool = False) -> Iterator[Tile]:
    """Tiles worth measuring, the default first. Some may not fit a device; the compiler then says so."""
    default = default_tile(kernel, unit, dtype, is_hip)
    yield default
    exact = dtype == torch.float32
    sides, depths = ((32, 64, 128), (16, 32)) if exact else ((64, 128, 256), (32, 64))
    stages = (1, 2) if is_hip else (2, 3) if exact else (3, 4)
    inner = (unit // 2, unit) if unit == 128 else (unit,)
    for side, own, depth, warps, stage in product(sides, inner, depths, (4, 8), stages):
        rows, columns = (own, side) if kernel == WEIGHT_GRADIENT else (side, own)
        tile = replace(default, rows=rows, columns=columns, depth=depth, warps=warps, stages=stage)
        # Fewer than 8 sums for each of 32 threads leave too little work between two loads, more than 128 spill.
        if tile != default and 8 <= side * own // (warps * 32) <= 128:
            yield tile


def fitted(tile: Tile, kernel: str, unit: int, tokens: int, live_per_row: float) -> Tile:
    """The tile, cut down for a small problem: few tokens, or few live blocks in a block row (`live_per_row`, mean)."""
    least = max(16, power_of_two(tokens))
    if kernel != WEIGHT_GRADIENT:
        return replace(tile, rows=min(tile.rows, least))
    columns = unit * power_of_two(round(live_per_row))
    return replace(tile, columns=min(tile.columns, columns), depth=min(tile.depth, least))


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
