"""packed_linear and packed_embedding against plain float64 products; index and storage of slots in any order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from packed_weights import leaf, matrix, packed_weight

from megasparse.kernels.block_sparse import (
    BlockIndex,
    assign_slots,
    build_index,
    choose,
    pack,
    packed_embedding,
    packed_linear,
    refresh_index,
    sparse_embedding,
    sparse_linear,
    unpack,
)

ROWS, COLUMNS = 5, 4


def layer(block: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, BlockIndex]:
    return packed_weight((ROWS, COLUMNS), block, dtype)


def test_storage_there_and_back() -> None:
    weight, index = layer(8)
    dense = unpack(weight, index.slot_blocks, (ROWS, COLUMNS))
    assert torch.equal(dense, matrix(weight, index))
    assert torch.equal(pack(dense, index.slot_blocks, 8), weight)
    assert (weight[index.slot_blocks < 0] == 0).all()


def test_index_knows_the_slot_of_each_block() -> None:
    _, index = layer(8)
    for slots, rows, columns in (
        (index.row_slots, index.rows, index.columns),
        (index.column_slots, index.column_rows, _columns_by_columns(index)),
    ):
        assert slots.dtype == torch.int32
        assert torch.equal(index.slot_blocks[slots.long()], rows * COLUMNS + columns)
    assert torch.equal(index.block_slots >= 0, index.mask)


def _columns_by_columns(index: BlockIndex) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(COLUMNS), index.column_offsets.diff().long()).int()


def test_index_is_refreshed_in_place() -> None:
    _, index = layer(8)
    held = index.lists
    moved = index.mask.roll(1, 1)
    index.mask.copy_(moved)
    index.slot_blocks.copy_(assign_slots(moved, len(index.slot_blocks)))
    refresh_index(index)
    fresh = build_index(moved, 8, slot_blocks=index.slot_blocks)
    for old, now, wanted in zip(held, index.lists, fresh.lists, strict=True):
        assert old is now and torch.equal(now, wanted)


@pytest.mark.parametrize("wrong", ["missing", "twice", "inactive"])
def test_index_refuses_slots_of_other_blocks(wrong) -> None:
    _, index = layer(8)
    slots = index.slot_blocks.clone()
    used = (slots >= 0).nonzero()[:, 0]
    if wrong == "missing":
        slots[used[0]] = -1
    elif wrong == "twice":
        slots[(slots < 0).nonzero()[0, 0]] = slots[used[0]]
    else:
        slots[used[0]] = COLUMNS // 2
    with pytest.raises(RuntimeError, match="mask and slot_blocks"):
        build_index(index.mask, 8, slot_blocks=slots)


@pytest.mark.parametrize("lead", [(), (7,), (3, 5)], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "dense", "reference"])
@pytest.mark.parametrize("probed", [False, True])
def test_matches_plain_autograd(kernel, lead, probed) -> None:
    weight0, index = layer(4)
    x0, bias0 = torch.randn(*lead, COLUMNS * 4).double(), torch.randn(ROWS * 4).double()
    x, weight, bias = leaf(x0), leaf(weight0), leaf(bias0)
    probe = torch.zeros(ROWS * 4, COLUMNS * 4, dtype=torch.float64, requires_grad=True) if probed else None
    y = packed_linear(x, weight, bias, index, kernel, probe)
    dy = torch.randn_like(y)
    y.backward(dy)
    x_ref, dense, bias_ref = leaf(x0), leaf(matrix(weight0, index)), leaf(bias0)
    y_ref = F.linear(x_ref, dense, bias_ref)
    y_ref.backward(dy)
    torch.testing.assert_close(y, y_ref)
    torch.testing.assert_close(x.grad, x_ref.grad)
    torch.testing.assert_close(bias.grad, bias_ref.grad)
    torch.testing.assert_close(weight.grad, pack(dense.grad, index.slot_blocks, 4))
    assert (weight.grad[index.slot_blocks < 0] == 0).all()
    if probed:
        torch.testing.assert_close(probe.grad, dense.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["dense", "reference"])
def test_both_storages_give_the_same_bits(kernel, dtype) -> None:
    weight0, index = layer(16, dtype)
    x0, bias0 = torch.randn(37, COLUMNS * 16).to(dtype), torch.randn(ROWS * 16).to(dtype)
    found = []
    for packed in (True, False):
        x, weight, bias = leaf(x0), leaf(weight0 if packed else matrix(weight0, index)), leaf(bias0)
        if packed:
            y = packed_linear(x, weight, bias, index, kernel)
        else:
            y = sparse_linear(x, weight, bias, build_index(index.mask, 16), kernel=kernel)
        y.backward(torch.ones_like(y))
        dweight = weight.grad if packed else pack(weight.grad, index.slot_blocks, 16)
        found.append((y, x.grad, dweight, bias.grad))
    for packed, dense in zip(*found, strict=True):
        assert torch.equal(packed, dense)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("probed", [False, True])
def test_embedding_matches_plain_autograd(dtype, probed) -> None:
    weight0, index = layer(4, dtype)
    ids = torch.randint(ROWS * 4, (3, 40))
    weight, dense = leaf(weight0), leaf(matrix(weight0, index))
    probe = torch.zeros(ROWS * 4, COLUMNS * 4, dtype=dtype, requires_grad=True) if probed else None
    y = packed_embedding(ids, weight, index, probe)
    y_ref = F.embedding(ids, dense)
    assert torch.equal(y, y_ref)
    dy = torch.randn_like(y)
    y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1))
    y_ref.backward(dy)
    torch.testing.assert_close(weight.grad, pack(dense.grad, index.slot_blocks, 4))
    assert (weight.grad[index.slot_blocks < 0] == 0).all()
    if probed:
        torch.testing.assert_close(probe.grad, dense.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_gives_equal_bits_in_every_run_and_at_any_number_of_threads(dtype) -> None:
    """Also those of dense storage, whose rows get their sums in the same order."""
    weight, index = layer(16, dtype)
    ids, dy = torch.randint(ROWS * 16, (900,)), torch.randn(900, COLUMNS * 16).to(dtype)
    dense = leaf(matrix(weight, index))
    sparse_embedding(ids, dense, build_index(index.mask, 16)).backward(dy)
    expected, before = pack(dense.grad, index.slot_blocks, 16), torch.get_num_threads()
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            weight = leaf(weight)
            packed_embedding(ids, weight, index).backward(dy)
            assert torch.equal(weight.grad, expected)
    finally:
        torch.set_num_threads(before)


def test_a_layer_without_any_block_and_a_batch_without_tokens() -> None:
    weight, index = layer(8)
    none = torch.zeros_like(index.mask)
    empty = build_index(none, 8, slot_blocks=torch.full_like(index.slot_blocks, -1))
    x, bias = torch.randn(3, COLUMNS * 8).double(), torch.randn(ROWS * 8).double()
    assert torch.equal(packed_linear(x, weight, bias, empty), bias.expand(3, -1))
    assert packed_linear(x[:0], weight, bias, index).shape == (0, ROWS * 8)
    assert not packed_embedding(torch.tensor([0, 39]), weight, empty).any()


def test_auto_takes_the_kernel_at_any_density() -> None:
    place = "auto", "cpu", torch.float32, 64, 64, 1.0, (256, 256)
    assert choose(*place, break_even=0.5, planned=True) == "dense"
    assert choose(*place, break_even=0.5, is_packed=True, planned=True) == "cpu"
    # Where no kernel reads the blocks: dense products.
    assert choose("auto", "cpu", torch.float64, 64, 64, 1.0, is_packed=True) == "dense"
