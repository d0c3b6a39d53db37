"""Where the live blocks of a weight matrix lie: lists by block row and by block column.

``build_index(mask, unit, num_live)`` makes them on the mask's device without asking the device anything, so that a
topology step costs no round trip to the host. The lists are those of a compressed sparse row matrix without values
(the weight is stored dense), and beside them the same blocks in column order, for the input gradient.

Names: R block rows, C block columns, L live blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockIndex:
    """Live blocks of side `unit`. All lists are int32 on the mask's device; a unit of 1 has none (empty tensors)."""

    mask: Tensor
    """bool [R, C], True where the block lives."""
    unit: int
    """Side of the square blocks."""
    num_live: int
    """L."""
    row_offsets: Tensor
    """[R + 1]: block row r holds the live blocks row_offsets[r] to row_offsets[r + 1] of `columns`."""
    columns: Tensor
    """[L]: block column of each live block, by rows, ascending within each row."""
    rows: Tensor
    """[L]: block row of each of the same blocks."""
    column_offsets: Tensor
    """[C + 1]: block column c holds the live blocks column_offsets[c] to column_offsets[c + 1] of `column_rows`."""
    column_rows: Tensor
    """[L]: block row of each live block, by columns, ascending within each column."""
    row_order: Tensor
    """[R]: block rows, those with most live blocks first: started in this order, uneven rows end together."""
    column_order: Tensor
    """[C]: block columns, those with most live blocks first."""

    @property
    def density(self) -> float:
        return self.num_live / self.mask.numel()

    @property
    def lists(self) -> tuple[Tensor, ...]:
        """All lists, in the order of the fields."""
        by_rows = self.row_offsets, self.columns, self.rows
        return *by_rows, self.column_offsets, self.column_rows, self.row_order, self.column_order


def build_index(mask: Tensor, unit: int, num_live: int | None = None) -> BlockIndex:
    """Index of the live blocks of `mask`.

    Args:
        mask: bool [R, C].
        unit: side of the square blocks; 1: no lists are made, as no kernel reads them.
        num_live: how many blocks live; None asks the device.
    """
    if num_live is None:
        num_live = int(mask.sum())
    if unit == 1:
        none = torch.empty(0, dtype=torch.int32, device=mask.device)
        return BlockIndex(mask, unit, num_live, *[none] * 7)
    row_offsets, columns, rows, row_order = _lists(mask, num_live)
    column_offsets, column_rows, _, column_order = _lists(mask.t(), num_live)
    lists = row_offsets, columns, rows, column_offsets, column_rows, row_order, column_order
    return BlockIndex(mask, unit, num_live, *lists)


def refresh_index(index: BlockIndex) -> None:
    """Bring the lists up to date after a change of the mask that left as many blocks alive.

    In place: CUDA graphs and compiled code that hold the addresses of the lists see the new ones.
    """
    fresh = build_index(index.mask, index.unit, index.num_live)
    for held, new in zip(index.lists, fresh.lists, strict=True):
        held.copy_(new)


def _lists(mask: Tensor, num_live: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets, columns and rows of the live entries in row-major order, and the rows by falling number of them."""
    counts = mask.sum(1)
    offsets = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    offsets[1:] = counts.cumsum(0)
    order = counts.argsort(descending=True, stable=True).to(torch.int32)
    # A stable sort brings the live entries to the front in their order; `nonzero` would wait for the device.
    places = mask.reshape(-1).to(torch.uint8).argsort(descending=True, stable=True)[:num_live]
    return offsets, (places % mask.shape[1]).to(torch.int32), (places // mask.shape[1]).to(torch.int32), order
