"""Which masks are allowed: single weights, n of every m in a row, square blocks.

    pattern = parse_pattern("2:4")           # or "unstructured", "16x16"
    pattern.check("layers.0.mlp.up", partition)

A *unit* is what is kept or removed as one: a weight, or a b x b block. Masks of units are bool [out / b, in / b].
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.config.loader import ConfigError
from megasparse.layers.linear import check_block_size
from megasparse.parallel import ShardSpec

ALLOWED = "unstructured, n:m such as 2:4 (n of every m weights of a row are kept), or bxb such as 16x16 (blocks)"


@dataclass(frozen=True)
class Pattern:
    """kept, group: of every `group` neighbouring weights of a row at most `kept` stay; 0: the pattern has no groups."""

    block_size: int = 1
    kept: int = 0
    group: int = 0

    @property
    def density(self) -> float | None:
        """The density that the pattern prescribes; None: any."""
        return self.kept / self.group if self.group else None

    def __str__(self) -> str:
        if self.group:
            return f"{self.kept}:{self.group}"
        return "unstructured" if self.block_size == 1 else f"{self.block_size}x{self.block_size}"

    def check(self, layer: str, partition: ShardSpec) -> None:
        """Raise ConfigError where the widths of a layer's weight do not divide."""
        rows, columns = partition.shape
        if self.group and columns % self.group:
            raise ConfigError(
                f"--pattern: {self}: {self.group} does not divide the {columns} inputs of layer {layer}; must be n:m "
                "with an m that does, or --keep-dense for this layer"
            )
        try:
            check_block_size(layer, partition, self.block_size)
        except ValueError as error:
            raise ConfigError(f"--pattern: {self}: {error}") from None

    def units_of(self, available: Tensor) -> Tensor:
        """Units that hold an available weight. available: bool in the shape of the weight."""
        return in_blocks(available, self.block_size).any(3).any(1)

    def weights_of(self, units: Tensor) -> Tensor:
        """A mask of units as one of weights."""
        return units.repeat_interleave(self.block_size, 0).repeat_interleave(self.block_size, 1)

    def unit_scores(self, scores: Tensor) -> Tensor:
        """Frobenius norm of each unit of a matrix of scores that are not negative."""
        return scores if self.block_size == 1 else in_blocks(scores, self.block_size).square().sum((1, 3)).sqrt()


def parse_pattern(text: str) -> Pattern:
    """Raises ConfigError for what names no pattern."""
    if text == "unstructured":
        return Pattern()
    groups, blocks = re.fullmatch(r"(\d+):(\d+)", text), re.fullmatch(r"(\d+)x(\d+)", text)
    if groups is not None and 1 <= int(groups[1]) < int(groups[2]):
        return Pattern(kept=int(groups[1]), group=int(groups[2]))
    if blocks is not None and int(blocks[1]) == int(blocks[2]) > 1:
        return Pattern(block_size=int(blocks[1]))
    raise ConfigError(f"--pattern: {text}; must be {ALLOWED}")


def in_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """[out, in] as [out / b, b, in / b, b]."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // block_size, block_size, columns // block_size, block_size)


def zeroed(weight: Tensor, active: Tensor) -> Tensor:
    """A copy with exact zeros, never negative ones, where `active` is False."""
    return torch.where(active, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
