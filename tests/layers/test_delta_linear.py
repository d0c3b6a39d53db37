"""Layers in which some units are trained: gradients, merging and memory against plain products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megasparse.layers.delta import Adapter, DeltaLinear, block_gradients, freeze, frozen_buffers


def frozen_layer(unit: int, rows: int = 37, columns: int = 21, *, bias: bool = True) -> DeltaLinear:
    layer = DeltaLinear("layer", columns, rows, unit=unit, bias=bias)
    torch.nn.init.normal_(layer.weight)
    if bias:
        torch.nn.init.normal_(layer.bias)
    freeze(layer)
    return layer


def some_units(layer: DeltaLinear, share: float = 0.4) -> torch.Tensor:
    return torch.randperm(layer.num_units)[: max(int(share * layer.num_units), 1)].sort().values


@pytest.mark.parametrize("unit", [1, 4, 16, 64])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_autograd_at_the_chosen_entries(unit: int, bias: bool) -> None:
    """Also where units hang over the edges, or one covers the whole matrix."""
    layer = frozen_layer(unit, bias=bias)
    frozen = layer.weight.clone()
    layer.choose(some_units(layer))
    layer.delta = torch.randn(layer.numbers.numel() * unit**2, requires_grad=True)
    x, direction = torch.randn(2, 5, 21, requires_grad=True), torch.randn(2, 5, 37)
    y = layer(x)
    y.backward(direction)
    at, inside = layer.entries()
    weight = frozen.clone()
    weight.view(-1)[at[inside]] += layer.delta.detach().view(at.shape)[inside]
    weight.requires_grad_()
    copy = x.detach().requires_grad_()
    expected = F.linear(copy, weight, layer.bias)
    expected.backward(direction)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, copy.grad)
    wanted = weight.grad.view(-1)[at] * inside
    # Sums of ten products of normal numbers, in another order.
    torch.testing.assert_close(layer.delta.grad.view(at.shape), wanted, rtol=1e-5, atol=1e-5)
    assert not layer.delta.grad.view(at.shape)[~inside].any(), "places outside never move"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unit", [1, 16])
def test_unmerging_gives_the_frozen_weight_back_bit_for_bit(unit: int, dtype: torch.dtype) -> None:
    layer = frozen_layer(unit)
    layer.weight = layer.weight.to(dtype)
    frozen = layer.weight.clone()
    numbers = some_units(layer)
    layer.choose(numbers)
    values = torch.randn(numbers.numel() * unit**2)
    layer.merge(values)
    at, inside = layer.entries()
    changed = torch.zeros(frozen.numel(), dtype=torch.bool)
    changed[at[inside]] = True
    assert torch.equal(layer.weight.view(-1)[~changed], frozen.view(-1)[~changed])
    merged = (frozen.float().view(-1)[at[inside]] + values.view(at.shape)[inside]).to(dtype)
    assert torch.equal(layer.weight.view(-1)[at[inside]], merged)
    # Merging again adds nothing to what was added, and other units begin from the frozen weight.
    layer.merge(values)
    assert torch.equal(layer.weight.view(-1)[at[inside]], merged)
    layer.choose(some_units(layer))
    assert torch.equal(layer.weight, frozen)


def test_blocks_are_gathered_a_few_at_a_time(monkeypatch) -> None:
    x, dy, numbers = torch.randn(9, 40), torch.randn(9, 24), torch.tensor([0, 3, 5, 7])
    at_once = block_gradients(x, dy, numbers, 8)
    monkeypatch.setattr("megasparse.layers.delta.GATHERED_ELEMENTS", 1)
    assert torch.equal(block_gradients(x, dy, numbers, 8), at_once)


def test_an_adapter_is_shared_out_and_shared_weights_stay_shared() -> None:
    layers = {name: frozen_layer(4) for name in "ab"}
    adapter = Adapter(layers, 48)
    assert adapter.sizes() == {"a": 48, "b": 0}
    layers["a"].choose(torch.tensor([2]))
    layers["b"].choose(torch.tensor([5, 9]))
    with torch.no_grad():
        adapter.values.copy_(torch.arange(48.0))
    adapter.hand_out()
    assert [layer.delta.tolist() for layer in layers.values()] == [list(range(16)), list(range(16, 48))]
    sum((layer(torch.randn(3, 21)) ** 2).sum() for layer in layers.values()).backward()
    # Block 5 is the last of its row, where one column is left.
    assert adapter.values.grad.count_nonzero() == 16 + 4 + 16
    tied = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "ab"})
    tied["b"].weight = tied["a"].weight
    freeze(tied)
    assert not list(tied.parameters()) and tied["b"].weight is tied["a"].weight
    assert frozen_buffers(tied)["a.weight"] == [(tied["a"], "weight"), (tied["b"], "weight")]
