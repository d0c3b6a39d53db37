"""Activations in the products of the Triton kernels, run by Triton's interpreter on the CPU: against float64, and in an
MLP against the layers called one by one.

Run by test_activated_products.py in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is
imported. `python interpreted_activated.py CASE ...`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from packed_weights import leaf, matrix, packed_weight  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from megasparse.config.schema import ModelConfig  # noqa: E402
from megasparse.kernels.block_sparse import activated, apply_mask_, assign_slots, build_index, gpu, pack  # noqa: E402
from megasparse.kernels.block_sparse.activated import Blocks  # noqa: E402
from megasparse.kernels.block_sparse.tiles import Tile  # noqa: E402
from megasparse.layers import MLP, LayerFactory, PackedLinear, SparseLinear, SparseSpec  # noqa: E402
from megasparse.layers.fused_pair import fused_pair  # noqa: E402
from megasparse.parallel import CommunicationGroup, TensorParallel  # noqa: E402
from megasparse.utils.activations import ACTIVATIONS  # noqa: E402

# Roundings of float32, relative to the largest entry, of sums of up to 320 products and then of others of them.
TOLERANCE = 5e-6


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == torch.float32 and got.shape == wanted.shape, f"{got.shape}, {wanted.shape}"
    if wanted.numel():
        error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3))
        assert error < TOLERANCE, f"{error:.2e}"


def layer(grid: tuple[int, int], block: int, density: float, is_packed: bool, bias: bool) -> Blocks:
    """With an empty and a full block row where the density lies between 0 and 1, and NaN where nothing may be read."""
    weight, index = packed_weight(grid, block, torch.float32, density=density)
    mask = index.mask.clone()
    if 0 < density < 1:
        mask[-1] = True
    slots = assign_slots(mask, int(mask.sum()) + 2)
    slots = slots[torch.randperm(len(slots))]
    keep = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    dense = torch.randn(keep.shape) / keep.shape[1] ** 0.5
    if is_packed:
        weight = pack(dense, slots, block).masked_fill((slots < 0)[:, None, None], torch.nan)
    else:
        weight = dense.masked_fill(~keep, torch.nan)
    index = build_index(mask, block, slot_blocks=slots if is_packed else None)
    return Blocks(weight, torch.randn(keep.shape[0]) if bias else None, index)


def whole(blocks: Blocks) -> Tensor:
    """[out, in] in float64, as a leaf."""
    index = blocks.lists
    dense = matrix(blocks.weight, index) if index.is_packed else blocks.weight
    return leaf(dense.double().nan_to_num(nan=0.0))


def check_pair(block: int, density: float, tokens: int, activation: str, *, is_packed: bool, bias: bool = True) -> None:
    up, down = (layer(grid, block, density, is_packed, bias) for grid in ((5, 3), (3, 5)))
    x, dy = torch.randn(tokens, 3 * block), torch.randn(tokens, 3 * block)
    first, second = (Blocks(leaf(b.weight), None if b.bias is None else leaf(b.bias), b.lists) for b in (up, down))
    leaves = [leaf(x), *(t for t in (*first[:2], *second[:2]) if t is not None)]
    y = activated.pair(leaves[0], first, second, activation)
    gradients = torch.autograd.grad(y, leaves, dy)

    exact_x, weights = leaf(x.double()), [whole(up), whole(down)]
    biases = [
        torch.zeros(len(w), dtype=torch.float64) if b.bias is None else b.bias.double()
        for w, b in zip(weights, (up, down), strict=True)
    ]
    biases = [leaf(b) for b in biases]
    h = ACTIVATIONS[activation].function(exact_x @ weights[0].t() + biases[0])
    wanted = h @ weights[1].t() + biases[1]
    exact = torch.autograd.grad(wanted, [exact_x, weights[0], biases[0], weights[1], biases[1]], dy.double())
    close(y.detach(), wanted.detach())
    dx, dup, dup_bias, ddown, ddown_bias = exact
    expected = [dx, stored(dup, up.lists), dup_bias, stored(ddown, down.lists), ddown_bias]
    if not bias:
        del expected[4], expected[2]
    for got, of in zip(gradients, expected, strict=True):
        close(got, of)
        # Exactly, outside of active blocks and in empty slots above all.
        assert (got[of == 0] == 0).all()


def stored(gradient: Tensor, index: Any) -> Tensor:
    block = index.block_size
    keep = index.mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return pack(gradient, index.slot_blocks, block) if index.is_packed else gradient * keep


def products() -> None:
    """Blocks, densities, odd token counts, empty and full block rows, both storages, both activations; no bias."""
    for block, tokens in ((16, 37), (32, 21), (64, 7), (16, 1), (16, 0)):
        for density in (0.1, 1.0):
            for is_packed in (False, True):
                for activation in activated.NAMES:
                    check_pair(block, density, tokens, activation, is_packed=is_packed)
    check_pair(16, 0.0, 5, "gelu", is_packed=False)
    check_pair(32, 0.4, 5, "gelu", is_packed=True, bias=False)
    assert set(activated.NAMES) < set(ACTIVATIONS)


def kernels() -> None:
    """z has the bits of the product alone; tiles of all kinds; what activations make of extreme numbers."""
    up = layer((4, 3), 32, 0.5, False, True)
    x, dy = torch.randn(50, 96), torch.randn(50, 128)
    for tile in (None, Tile(16, 16, 64, 4, 2), Tile(32, 32, 16, 4, 2), Tile(64, 32, 32, 4, 2, swapped=True)):
        z, h = gpu.activated_forward(x, up.weight, up.bias, up.lists, "gelu", tile)
        assert torch.equal(z, gpu.forward(x, up.weight, up.bias, up.lists, tile))
        close(h, ACTIVATIONS["gelu"].function(z.double()))
        before = torch.randn(50, 96)
        dz = gpu.activated_input_gradient(dy, up.weight, up.lists, "gelu", before, tile)
        exact = leaf(before.double())
        ACTIVATIONS["gelu"].function(exact).backward(gpu.input_gradient(dy, up.weight, up.lists, tile).double())
        close(dz, exact.grad)
    extreme = torch.tensor([0.0, 30.0, -30.0, 1e15, -1e15, torch.inf, torch.nan, *[1.0] * 9])
    for name in activated.NAMES:
        index = build_index(torch.zeros(1, 1, dtype=torch.bool), 16)
        _, h = gpu.activated_forward(torch.ones(1, 16), torch.zeros(16, 16), extreme, index, name)
        wanted = ACTIVATIONS[name].function(extreme)[None]
        torch.testing.assert_close(h, wanted, equal_nan=True)


def mlp(
    activation: str = "gelu",
    *,
    spec: SparseSpec | None = None,
    drop: tuple[str, ...] = ("up", "down"),
    **options: Any,
) -> MLP:
    """About half of the blocks of the layers that `drop` names are active."""
    config = ModelConfig(hidden_size=32, num_attention_heads=2, activation=activation)
    options = {"kernel": "triton", "elementwise": "triton", "seed": 3} | options
    spec = spec or SparseSpec(16)
    made = MLP("layers.0.mlp", config, LayerFactory(sparse=lambda name: spec, **options), output_std=0.1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, each in made.named_children():
            if not isinstance(each, SparseLinear) or name not in drop:
                continue
            each.mask.copy_(torch.rand(each.mask.shape) < 0.5)
            each.mask[0, 0], each.mask[-1, -1] = True, False
            if isinstance(each, PackedLinear):
                each.slot_blocks.copy_(assign_slots(each.mask, each.capacity))
                each.weight.copy_(each.initial_blocks())
            else:
                apply_mask_(each.weight, each.mask, each.block_size)
            each.topology_changed()
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return made


def run(made: MLP, through: Callable[[MLP, Tensor], Tensor] | None = None) -> list[Tensor]:
    """The result and all gradients."""
    torch.manual_seed(6)
    x = torch.randn(3, 7, 32, requires_grad=True)
    dy = torch.randn(3, 7, 32)
    y = made(x) if through is None else through(made, x)
    leaves = [x, *(p for p in made.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def unfused(made: MLP, x: Tensor) -> Tensor:
    return made.down(made.activation((made.gate_up if made.gated else made.up)(x)))


def layers() -> None:
    """An MLP in both storages, with and without activation checkpointing, equals its layers called one by one."""
    for spec in (SparseSpec(16), SparseSpec(16, capacity=16)):
        for name in activated.NAMES:
            made = mlp(name, spec=spec)
            with watched() as calls:
                found = run(made)
                again = run(made, lambda each, x: checkpoint(each, x, use_reentrant=False))
            assert calls.call_count == 3, "once, and once more in the backward pass of the checkpoint"
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            for got, wanted in zip(found, run(made, unfused), strict=True):
                close(got, wanted.double())
    made.up.weight.requires_grad_(False)
    for got, wanted in zip(run(made), run(made, unfused), strict=True):
        close(got, wanted.double())
    x = torch.randn(2, 32, requires_grad=True)
    y = made(x)
    made.up.mask[0, 0] = False
    try:
        y.sum().backward()
    except AssertionError as error:
        assert "topology was changed" in str(error)
    else:
        raise RuntimeError("the change of the topology was not seen")


def watched() -> Any:
    """The calls of ``activated.pair`` while it lasts."""
    return mock.patch.object(activated, "pair", wraps=activated.pair)


def apart() -> None:
    """Where the layers are computed one by one, with the bits that this has."""
    hooked, global_hook, collecting, no_gradient = mlp(), mlp(), mlp(), mlp()
    hooked.down.register_forward_pre_hook(lambda *_: None)
    collecting.down.collect_dense_gradient = True
    in_training = mlp()
    in_training.in_training = unfused
    other_class = mlp()
    other_class.up.__class__ = type("Other", (SparseLinear,), {})
    situations = {
        "hooks": hooked,
        "dense gradient": collecting,
        "in_training": in_training,
        "other class": other_class,
        "whole weight": mlp(drop=("up",)),
        "low rank": mlp(spec=SparseSpec(16, low_rank=4)),
        "gated": mlp("swiglu"),
        "exact": mlp("gelu_exact"),
        "another backend": mlp(kernel="reference"),
        "dense products": mlp(kernel="dense"),
        "torch's activation": mlp(elementwise="torch"),
    }
    with watched() as calls:
        for name, made in situations.items():
            assert all(torch.equal(a, b) for a, b in zip(run(made), run(made, unfused), strict=True)), name
            assert not calls.called, name
        packed_collecting(calls)
        x = torch.randn(2, 32)
        with torch.no_grad():
            assert torch.equal(no_gradient(x), unfused(no_gradient, x)) and not calls.called
        no_gradient.requires_grad_(False)
        assert torch.equal(no_gradient(x), unfused(no_gradient, x)) and not calls.called
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        run(global_hook)
        handle.remove()
        divided = mlp(tensor_parallel=TensorParallel(CommunicationGroup(0, 2)))
        fused_pair(divided.up, divided.down, x.requires_grad_(), "gelu", kernel="triton")
        assert not calls.called
        traced = mlp()
        traced_y = torch.compile(traced, backend="eager")(x)
        assert not calls.called and traced_y.shape == x.shape
        run(traced)
        assert calls.call_count == 1


def packed_collecting(calls: Any) -> None:
    """The dense gradient of a layer in packed storage comes from its probe."""
    made, found = mlp(spec=SparseSpec(16, capacity=16)), []
    made.up.collect_dense_gradient, made.up.dense_gradient_ready = True, found.append
    assert all(torch.equal(a, b) for a, b in zip(run(made), run(made, unfused), strict=True))
    assert not calls.called


CASES = {"products": products, "kernels": kernels, "layers": layers, "apart": apart}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(7)
    for name in sys.argv[1:]:
        CASES[name]()
        print(f"{name}: passed")
