"""Linear and SparseLinear: dense path, sparse path, low-rank branch, tied look-up, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megasparse.kernels.block_sparse import apply_mask_
from megasparse.layers import Embedding, LayerFactory, Linear, SparseLinear, SparseSpec


def sparse(name="layers.0.mlp.up", *, block_size=4, **options) -> SparseLinear:
    return SparseLinear(name, 16, 24, bias=True, block_size=block_size, **options)


def make_sparse(layer: SparseLinear) -> torch.Tensor:
    """Kill about half of the units; returns the mask of the weights."""
    layer.mask.copy_(torch.rand(layer.mask.shape) < 0.5)
    layer.mask[0, 0], layer.mask[-1, -1] = True, False
    layer.topology_changed()
    apply_mask_(layer.weight.data, layer.mask, layer.block_size)
    return layer.mask.repeat_interleave(layer.block_size, 0).repeat_interleave(layer.block_size, 1)


def test_sparse_layer_starts_as_the_dense_one() -> None:
    layer, plain = sparse(), Linear("layers.0.mlp.up", 16, 24, bias=True)
    assert layer.index is None and layer.mask.all() and layer.mask.shape == (6, 4)
    x = torch.randn(3, 5, 16)
    assert torch.equal(layer(x), plain(x))
    assert list(layer.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    layer(x).sum().backward()
    assert (layer.weight.grad != 0).all()


def test_the_kernel_is_chosen_once_per_topology_and_size_of_input(monkeypatch) -> None:
    layer, asked = sparse(), []

    def choose(kernel: str, device: str, dtype: torch.dtype, block_size: int, tokens: int, density: float, *_, **__):
        asked.append((tokens, density))
        return "reference" if density < 0.4 else "dense"

    monkeypatch.setattr("megasparse.layers.linear.choose", choose)
    layer(torch.randn(5, 16))
    assert layer.backend == "dense" and not asked, "all units are active"
    layer.mask[:, :2] = False
    layer.topology_changed()
    for tokens in (5, 7, 5, 7, 5):
        layer(torch.randn(tokens, 16))
    assert asked == [(5, 0.5), (7, 0.5)] and layer.backend == "dense"
    layer.mask[:, :3] = False
    layer.topology_changed()
    # The ledger and the log know of the new kernel before the next forward pass.
    assert asked[2:] == [(5, 0.25)] and layer.backend == "reference"
    layer(torch.randn(5, 16))
    assert len(asked) == 3


def test_topology_changed_reads_the_mask_or_believes_the_caller() -> None:
    layer = sparse()
    layer.mask[0, 0] = False
    assert layer.index is None
    layer.topology_changed()
    assert layer.index is not None and layer.index.num_active == layer.mask.numel() - 1
    layer.topology_changed(num_active=layer.mask.numel())
    assert layer.index is None


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_gradient_of_inactive_units(block_size) -> None:
    layer = sparse(block_size=block_size)
    keep = make_sparse(layer)
    x, dy = torch.randn(7, 16), torch.randn(7, 24)
    layer(x).backward(dy)
    masked = layer.weight.grad.clone()
    assert (masked[~keep] == 0).all() and (masked[keep] != 0).all()

    layer.weight.grad = None
    layer.collect_dense_gradient = True
    layer(x).backward(dy)
    assert (layer.weight.grad[~keep] != 0).all()
    assert torch.equal(layer.weight.grad[keep], masked[keep])


def test_side_path_is_silent_at_first_and_dense_ever_after() -> None:
    layer = sparse(low_rank=3)
    keep = make_sparse(layer)
    x = torch.randn(5, 16, requires_grad=True)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.side_in.shape == (3, 16) and layer.side_out.shape == (24, 3)
    with torch.no_grad():
        layer.side_out.normal_()
    product = layer.weight + layer.side_out @ layer.side_in
    # Two float32 sums in another order, 16 terms.
    torch.testing.assert_close(layer(x), F.linear(x, product, layer.bias), rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    assert layer.side_in.grad.abs().min() > 0 and (layer.weight.grad[~keep] == 0).all()


@pytest.mark.parametrize("block_size", [0, 3, 5, 16])
def test_widths_must_be_multiples_of_the_unit(block_size) -> None:
    with pytest.raises(
        ValueError, match=rf"block_size: {block_size} .*layers.0.mlp.up \(24 x 16\); must be 1, 2, 4, 8$"
    ):
        sparse(block_size=block_size)


def test_mask_stays_boolean_and_out_of_the_state() -> None:
    layer = sparse().bfloat16()
    assert layer.mask.dtype == torch.bool and "mask" not in layer.state_dict()
    assert layer.weight.dtype == torch.bfloat16


def test_factory_follows_the_rule() -> None:
    factory = LayerFactory(
        lambda name: SparseSpec(8, low_rank=2) if "mlp" in name else None, seed=5, kernel="reference"
    )
    plain = factory.column("layers.0.attention.qkv", 16, 24, bias=False, init_std=0.1)
    layer = factory.column("layers.0.mlp.up", 16, 24, bias=True, init_std=0.1)
    assert type(plain) is Linear and plain.bias is None
    assert type(layer) is SparseLinear
    assert (layer.block_size, layer.low_rank, layer.kernel) == (8, 2, "reference")
    twin = LayerFactory(seed=5).column("layers.0.mlp.up", 16, 24, bias=True, init_std=0.1)
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("spec", [None, SparseSpec(4)], ids=["plain", "sparse"])
def test_tied_head_shares_weight_mask_and_gradient_rule(spec) -> None:
    factory = LayerFactory(lambda name: spec)
    table = factory.embedding("embedding.tokens", 24, 16, 0.5, divided=True)
    head = factory.column("head", 16, 24, bias=False, init_std=0.5, weight=table.weight)
    table.tie(head)
    assert [name for name, _ in nn.ModuleDict({"table": table, "head": head}).named_parameters()] == ["table.weight"]
    keep = make_sparse(head) if spec else torch.ones(24, 16, dtype=torch.bool)

    ids = torch.randint(24, (50,))
    table(ids).square().sum().backward()
    from_table = table.weight.grad.clone()
    table.weight.grad = None
    head(torch.randn(9, 16)).square().sum().backward()
    from_head = table.weight.grad
    for gradient in (from_table, from_head):
        assert (gradient[~keep] == 0).all() and gradient[keep].abs().sum() > 0
    if spec:
        head.collect_dense_gradient = True
        table.weight.grad = None
        table(ids).sum().backward()
        assert table.weight.grad[~keep].abs().sum() > 0


def test_untied_table() -> None:
    table = Embedding("embedding.tokens", 10, 4)
    ids = torch.tensor([[3, 3], [0, 9]])
    assert torch.equal(table(ids), table.weight[ids])
