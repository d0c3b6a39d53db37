"""Lists of active blocks against what `nonzero` finds."""

from __future__ import annotations

import pytest
import torch

from megasparse.kernels.block_sparse import build_index


@pytest.mark.parametrize("density", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (5, 8)], ids=str)
def test_lists_are_those_of_the_mask(shape, density) -> None:
    mask = torch.rand(shape) < density
    index = build_index(mask, 32, int(mask.sum()))
    rows, columns = mask.nonzero(as_tuple=True)
    assert index.rows.tolist() == rows.tolist() and index.columns.tolist() == columns.tolist()
    by_column = mask.t().nonzero(as_tuple=True)
    assert index.column_rows.tolist() == by_column[1].tolist()
    assert index.row_offsets.tolist() == [0, *mask.sum(1).cumsum(0).tolist()]
    assert index.column_offsets.tolist() == [0, *mask.sum(0).cumsum(0).tolist()]
    assert {part.dtype for part in index.lists} == {torch.int32}
    assert index.num_active == mask.sum() and index.density == mask.sum() / mask.numel()
    counted = build_index(mask, 32)
    assert all(torch.equal(one, two) for one, two in zip(index.lists, counted.lists, strict=True))


def test_single_weights_have_no_lists() -> None:
    index = build_index(torch.rand(6, 4) < 0.5, 1)
    assert all(part.numel() == 0 for part in index.lists) and index.num_active == index.mask.sum()
