"""PackedLinear against a SparseLinear of the same values: results, gradients, dense gradient; tied heads, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megasparse.kernels.block_sparse import apply_mask_, assign_slots, pack
from megasparse.layers import HeadInChunks, LayerFactory, Linear, PackedLinear, SparseLinear, SparseSpec, Vocabulary
from megasparse.parallel import CommunicationGroup, ShardSpec, TensorParallel, shard_spec_of

IN, OUT, BLOCK = 16, 24, 4


def packed(*, capacity: int = 20, block_size: int = BLOCK, **options) -> PackedLinear:
    return PackedLinear("layers.0.mlp.up", IN, OUT, bias=True, block_size=block_size, capacity=capacity, **options)


@torch.no_grad()
def fill(layer: PackedLinear, like: SparseLinear) -> None:
    """The values and blocks of a layer in dense storage, in slots of random order."""
    slots = assign_slots(like.mask, layer.capacity)
    layer.slot_blocks.copy_(slots[torch.randperm(len(slots))])
    layer.mask.copy_(like.mask)
    layer.weight.copy_(pack(like.weight, layer.slot_blocks, layer.block_size))
    for name, parameter in layer.named_parameters():
        if name != "weight":
            parameter.copy_(like.get_parameter(name))
    layer.topology_changed()


def drop_half(layer: SparseLinear) -> None:
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
    layer.mask[0, 0], layer.mask[-1, -1] = True, False
    layer.topology_changed()
    apply_mask_(layer.weight.data, layer.mask, layer.block_size)


def pair(**options) -> tuple[PackedLinear, SparseLinear]:
    dense = SparseLinear("layers.0.mlp.up", IN, OUT, bias=True, block_size=BLOCK, **options)
    for parameter in dense.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    drop_half(dense)
    layer = packed(**options)
    fill(layer, dense)
    return layer, dense


def received(layer: PackedLinear) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    layer.collect_dense_gradient, layer.dense_gradient_ready = True, found.append
    return found


def test_it_begins_empty_and_declares_its_storage() -> None:
    layer = packed(tensor_parallel=TensorParallel(CommunicationGroup(1, 2)), capacity=5)
    assert shard_spec_of(layer.weight) == ShardSpec((10, BLOCK, BLOCK), 0, 2) and layer.weight.shape == (
        5,
        BLOCK,
        BLOCK,
    )
    assert layer.partition == ShardSpec((OUT, IN), 0, 2) and layer.grid.local_shape == (3, 4) == layer.mask.shape
    assert (layer.slot_blocks == -1).all() and layer.slot_blocks.dtype == torch.int32 and not layer.mask.any()
    assert list(layer.state_dict()) == ["weight", "bias"] and not layer.weight.any()
    with pytest.raises(AssertionError, match="topology_changed was not called"):
        layer(torch.randn(3, IN))
    layer.topology_changed(0)
    assert torch.equal(layer(torch.randn(3, IN)), layer.bias.expand(3, -1))


@pytest.mark.parametrize("low_rank", [0, 3])
def test_it_is_the_layer_in_dense_storage(low_rank) -> None:
    layer, dense = pair(low_rank=low_rank)
    x = torch.randn(7, 5, IN)
    dy, results = torch.randn(7, 5, OUT), []
    for one in (layer, dense):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, *(p.grad for name, p in one.named_parameters() if name != "weight")))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(layer.weight.grad, pack(dense.weight.grad, layer.slot_blocks, BLOCK))
    assert torch.equal(layer.dense_weight(), dense.weight)
    assert not layer.dense_weight().requires_grad


@pytest.mark.parametrize("division", ["column", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("collect", [False, True])
def test_it_is_the_layer_in_dense_storage_by_the_kernels_too(block_size, dtype, division, collect) -> None:
    """`auto` takes the same kernel for both at this density; where there is none, dense products for both."""
    options = {"bias": True, "block_size": block_size, "division": division, "break_even": 1.0}
    dense = SparseLinear("layers.0.mlp.up", 6 * block_size, 4 * block_size, init_std=1.0, **options)
    drop_half(dense)
    layer = PackedLinear("layers.0.mlp.up", 6 * block_size, 4 * block_size, capacity=24, **options)
    fill(layer, dense)
    found: list[torch.Tensor] = []
    if collect:
        found, dense.collect_dense_gradient = received(layer), True
    x, dy, results = torch.randn(29, 6 * block_size).to(dtype), torch.randn(29, 4 * block_size).to(dtype), []
    for one in (layer.to(dtype), dense.to(dtype)):
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, one.bias.grad))
    assert layer.backend == dense.backend
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert len(found) == collect
    assert all(gradient.dtype == dtype and torch.equal(gradient, dense.weight.grad) for gradient in found)
    assert torch.equal(layer.weight.grad, pack(dense.weight.grad, layer.slot_blocks, block_size))


def test_slots_are_used_again() -> None:
    """A block of another place in the same slot: the lists are changed in place, as the number of blocks stays."""
    layer, dense = pair()
    index = layer.index
    slot = int((layer.slot_blocks >= 0).nonzero()[0])
    number = int((~layer.mask).flatten().nonzero()[0])
    layer.mask.view(-1)[layer.slot_blocks[slot].long()] = False
    layer.mask.view(-1)[number] = True
    layer.slot_blocks[slot] = number
    layer.topology_changed()
    assert layer.index is index
    dense.mask.copy_(layer.mask)
    dense.weight.data.copy_(layer.dense_weight())
    dense.topology_changed()
    x = torch.randn(9, IN)
    assert torch.equal(layer(x), dense(x))


def test_all_blocks_active() -> None:
    dense = SparseLinear("layers.0.mlp.up", IN, OUT, bias=True, block_size=BLOCK)
    layer = packed(capacity=24)
    fill(layer, dense)
    x = torch.randn(9, IN)
    assert torch.equal(layer(x), dense(x)) and layer.index is not None


def test_dense_gradient() -> None:
    layer, dense = pair()
    found, dense.collect_dense_gradient = received(layer), True
    for number in (1, 2):
        x, dy = torch.randn(7, IN), torch.randn(7, OUT)
        dense.weight.grad = layer.weight.grad = None
        for one in (layer, dense):
            with torch.no_grad():
                one(x)
            one(x).backward(dy)
        assert len(found) == number and torch.equal(found[-1], dense.weight.grad)
        assert torch.equal(layer.weight.grad, pack(dense.weight.grad, layer.slot_blocks, BLOCK))
    layer.collect_dense_gradient = False
    layer(x).backward(dy)
    assert len(found) == 2


def test_dense_gradient_when_activations_are_computed_again() -> None:
    layer, dense = pair()
    found, dense.collect_dense_gradient = received(layer), True
    x, dy = torch.randn(7, IN, requires_grad=True), torch.randn(7, OUT)
    for one in (layer, dense):
        y = torch.utils.checkpoint.checkpoint(lambda x, one=one: one(x).tanh(), x, use_reentrant=False)
        y.backward(dy)
    assert len(found) == 1 and torch.equal(found[0], dense.weight.grad)


def test_dense_gradient_of_a_compiled_block() -> None:
    """The probe cuts the graph while the dense gradient is wanted, and only then."""
    layer, dense = pair()
    found, before = received(layer), torch._dynamo.utils.counters["graph_break"].copy()
    block, like = nn.Sequential(nn.Tanh(), layer, nn.Tanh()), nn.Sequential(nn.Tanh(), dense, nn.Tanh())
    torch._dynamo.reset()
    block.compile(backend="aot_eager")
    x, dy = torch.randn(7, IN), torch.randn(7, OUT)
    for collect in (False, True, True, False):
        layer.collect_dense_gradient = dense.collect_dense_gradient = collect
        for one in (block, like):
            one.zero_grad()
            one(x).backward(dy)
        if not (collect or found):
            assert torch._dynamo.utils.counters["graph_break"] == before
        expected = pack(dense.weight.grad, layer.slot_blocks, BLOCK)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-6, atol=1e-6)
        if collect:
            torch.testing.assert_close(found[-1], dense.weight.grad, rtol=1e-6, atol=1e-6)
    assert len(found) == 2
    torch._dynamo.reset()


def test_each_dense_gradient_is_gone_before_the_next_one() -> None:
    """A chain of layers: when one gets its gradient, no later one has it still to come."""
    layers, order = [packed(capacity=24) for _ in range(3)], []
    for number, layer in enumerate(layers):
        fill(layer, SparseLinear("layers.0.mlp.up", IN, OUT, bias=True, block_size=BLOCK))
        layer.weight.register_hook(lambda _, number=number: order.append(f"weight {number}"))
        layer.collect_dense_gradient = True
        layer.dense_gradient_ready = lambda _, number=number: order.append(f"dense {number}")
    x = torch.randn(5, IN)
    for layer in layers:
        x = layer(x)[:, :IN].tanh()
    x.sum().backward()
    assert [words for words in order if "dense" in words] == ["dense 2", "dense 1", "dense 0"]
    assert order.index("dense 2") < order.index("weight 1") and order.index("dense 1") < order.index("weight 0")


def heads(spec: SparseSpec) -> tuple[nn.Module, Linear]:
    factory = LayerFactory(lambda name: spec, seed=3)
    table = factory.embedding("embedding.tokens", OUT, IN, 0.5, divided=True)
    head = factory.column("head", IN, OUT, bias=False, init_std=0.5, weight=table.weight)
    table.tie(head)
    return table, head


@pytest.mark.parametrize("chunk_rows", [4, 100])
def test_tied_head_in_chunks(chunk_rows) -> None:
    """Head and table together give one dense gradient, for all chunks, with the factor of the mean loss."""
    table, dense = heads(SparseSpec(BLOCK))
    drop_half(dense)
    packed_table, layer = heads(SparseSpec(BLOCK, capacity=20))
    assert isinstance(layer, PackedLinear) and packed_table.weight is layer.weight
    both = nn.ModuleDict({"table": packed_table, "head": layer})
    assert [name for name, _ in both.named_parameters()] == ["table.weight"]
    fill(layer, dense)
    found, dense.collect_dense_gradient = received(layer), True
    ids, targets, losses = torch.randint(OUT, (3, 7)), torch.randint(OUT, (3, 7)), []
    for one, head in ((table, dense), (packed_table, layer)):
        chunked = HeadInChunks(head, Vocabulary(OUT, OUT, TensorParallel()), chunk_elements=chunk_rows * OUT)
        loss = chunked(one(ids), chunked.vocabulary.next_token_losses(targets))
        (3 * loss).backward()
        losses.append(loss)
    assert torch.equal(*losses)
    assert len(found) == 1
    # The same products; autograd adds what table and head give in the order in which they come.
    torch.testing.assert_close(found[0], dense.weight.grad, rtol=1e-6, atol=1e-7)
    expected = pack(dense.weight.grad, layer.slot_blocks, BLOCK)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-6, atol=1e-7)


def test_nobody_takes_the_dense_gradient() -> None:
    layer, _ = pair()
    layer.collect_dense_gradient = True
    with pytest.raises(AssertionError, match="nobody takes the dense gradient"):
        layer(torch.randn(3, IN)).sum().backward()


def test_the_factory_makes_it() -> None:
    factory = LayerFactory(lambda name: SparseSpec(BLOCK, low_rank=2, capacity=6), kernel="reference")
    for layer in (factory.column("up", IN, OUT, True, 0.1), factory.row("down", IN, OUT, True, 0.1)):
        assert type(layer) is PackedLinear
        assert (layer.capacity, layer.low_rank, layer.kernel, layer.division[:1]) == (
            6,
            2,
            "reference",
            "cr"[layer.name == "down"],
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 1}, "block_size: 1 in layer layers.0.mlp.up cannot be packed: each single weight"),
        ({"capacity": 0}, "capacity: 0 .*layers.0.mlp.up; must be 1 to 24"),
        ({"capacity": 25}, "capacity: 25 .*must be 1 to 24"),
        ({"block_size": 3}, "block_size: 3 does not divide .*must be 1, 2, 4, 8$"),
    ],
    ids=str,
)
def test_refusals(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        packed(**options)
