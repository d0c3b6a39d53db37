"""Active units of a matrix and their places, encoded and decoded: the same bits come back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megasparse.checkpoint.compact import encoding
from megasparse.checkpoint.compact.encoding import (
    active_values,
    common_fill,
    decode_places,
    encode_places,
    smallest_form,
    stored_bytes,
    with_active_values,
)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(
    st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 4]), st.floats(0, 1), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int16]),
)  # fmt: skip
def test_values_come_back_bit_by_bit(rows, columns, block_size, density, seed, dtype) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(rows, columns) < density
    # Every bit pattern there is: negative zeros, infinities and what is no number included.
    bits = torch.randint(-(2**31), 2**31 - 1, (rows * block_size, columns * block_size), dtype=torch.int32)
    matrix = bits.view(torch.float32) if dtype == torch.float32 else bits.to(torch.int16).view(dtype)
    fill = int(bits.view(-1)[0]) if dtype == torch.float32 else int(bits.to(torch.int16).view(-1)[0])
    values = active_values(matrix, mask, block_size)
    whole = with_active_values(values, mask, block_size, fill)
    assert common_fill(whole, mask, block_size) == (fill if not mask.all() else 0)
    active = mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    assert same_bits(whole[active], matrix[active]) and values.numel() == int(active.sum())
    assert same_bits(active_values(whole, mask, block_size), values)


@pytest.mark.parametrize("block_size", [1, 2])
def test_portions_of_rows_make_no_difference(monkeypatch, block_size) -> None:
    mask, matrix = torch.rand(7, 5) < 0.4, torch.randn(7 * block_size, 5 * block_size)
    matrix[~mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)] = 2.5
    at_once = active_values(matrix, mask, block_size), common_fill(matrix, mask, block_size)
    monkeypatch.setattr(encoding, "ENTRIES_AT_ONCE", 3 * 5 * block_size**2)
    values, fill = active_values(matrix, mask, block_size), common_fill(matrix, mask, block_size)
    assert same_bits(values, at_once[0]) and fill == at_once[1] is not None
    assert same_bits(with_active_values(values, mask, block_size, fill), matrix)
    matrix[-1, -1], mask[-1, -1] = 2.0, False
    assert common_fill(matrix, mask, block_size) is None


def test_blocks_lie_one_after_another() -> None:
    matrix = torch.arange(16.0).view(4, 4)
    mask = torch.tensor([[False, True], [True, False]])
    assert active_values(matrix, mask, 2).tolist() == [[[2, 3], [6, 7]], [[8, 9], [12, 13]]]


def test_a_negative_zero_among_zeros_is_no_common_fill() -> None:
    matrix, mask = torch.zeros(2, 2), torch.tensor([[True, False], [False, False]])
    assert common_fill(matrix, mask, 1) == 0
    matrix[1, 1] = -0.0
    assert common_fill(matrix, mask, 1) is None
    matrix[mask.logical_not()] = -0.0
    fill = common_fill(matrix, mask, 1)
    assert fill == -(2**31) and same_bits(with_active_values(matrix[mask], mask, 1, fill), matrix)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99), st.sampled_from(["bits", "list"]))
def test_masks_come_back(rows, columns, density, seed, form) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(rows, columns) < density
    stored = encode_places(mask, form)
    num_active = int(mask.sum())
    assert stored.numel() * stored.element_size() == stored_bytes(form, mask.numel(), num_active)
    assert torch.equal(decode_places(stored, form, (rows, columns), num_active), mask)


def test_the_shorter_form_is_taken() -> None:
    assert (smallest_form(3200, 99), smallest_form(3200, 101)) == ("list", "bits")


@pytest.mark.parametrize(
    ("stored", "form", "num_active", "reason"),
    [
        (torch.zeros(1, dtype=torch.uint8), "bits", 0, "do not hold 12 units"),
        (torch.tensor([255, 0], dtype=torch.uint8), "bits", 7, "8 active units where 7 are announced"),
        (torch.tensor([3, 12], dtype=torch.int32), "list", 2, "outside 0 to 11"),
        (torch.tensor([-1], dtype=torch.int32), "list", 1, "outside 0 to 11"),
        (torch.tensor([3, 3], dtype=torch.int32), "list", 2, "1 active units where 2 are announced"),
    ],
)
def test_places_that_do_not_fit_are_refused(stored, form, num_active, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_places(stored, form, (3, 4), num_active)
