"""The Triton kernels, run by Triton's interpreter on the CPU, against float64 products.

Run by test_block_sparse_triton.py in a process of its own, because TRITON_INTERPRET=1 must be set before Triton is
imported and would change every other kernel of that process. `python interpreted_products.py CASE ...`.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from packed_weights import leaf, matrix, packed_weight  # noqa: E402

from megasparse.kernels.block_sparse import (  # noqa: E402
    build_index,
    gpu,
    packed_linear,
    sparse_linear,
    tile_cache,
    tuning,
    unpack,
)
from megasparse.kernels.block_sparse.index import BlockIndex  # noqa: E402
from megasparse.kernels.block_sparse.tiles import FORWARD, Tile, default_tile  # noqa: E402


def expand(mask: torch.Tensor, block_size: int) -> torch.Tensor:
    return mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)


def check(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, plus: torch.Tensor | None = None) -> None:
    """`got` is a b + plus within the bound for float32 sums in any order: each of K + 1 roundings is 2^-24 at most."""
    a, b = a.double(), b.double()
    expected, largest = a @ b, a.abs() @ b.abs()
    if plus is not None:
        expected, largest = expected + plus.double(), largest + plus.double().abs()
    assert got.dtype == torch.float32 and got.shape == expected.shape
    excess = (got.double() - expected).abs() - (a.shape[1] + 2) * 2**-24 * largest
    assert excess.max() <= 0, f"beyond the bound by {excess.max():.2e}"


def layer(
    mask: torch.Tensor, block_size: int, tokens: int
) -> tuple[BlockIndex, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Index, x, weight and dy of a layer."""
    keep = expand(mask, block_size)
    weight = torch.randn(keep.shape) * keep
    return build_index(mask, block_size), torch.randn(tokens, keep.shape[1]), weight, torch.randn(tokens, keep.shape[0])


def check_products(mask: torch.Tensor, block_size: int, tokens: int) -> None:
    index, x, weight, dy = layer(mask, block_size, tokens)
    bias, keep = torch.randn(weight.shape[0]), expand(mask, block_size)
    # An inactive block must not be read: what is there may be anything.
    poisoned = weight.masked_fill(~keep, torch.nan)
    check(gpu.forward(x, poisoned, bias, index), x, weight.t(), bias)
    check(gpu.forward(x, poisoned, None, index), x, weight.t())
    check(gpu.input_gradient(dy, poisoned, index), dy, weight)
    check_masked(gpu.weight_gradient(dy, x, index), dy, x, keep)


def check_masked(dweight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> None:
    """As `check`, for dW = dy^T x that is exactly zero where `keep` is False."""
    assert (dweight[~keep.bool()] == 0).all()
    expected, largest = dy.double().t() @ x.double(), dy.double().abs().t() @ x.double().abs()
    excess = ((dweight - expected * keep).abs() - (len(x) + 2) * 2**-24 * largest).max()
    assert excess <= 0, f"beyond the bound by {excess:.2e}"


def products() -> None:
    """All blocks; random topologies from empty to full, rows and columns without an active block, odd token counts."""
    for block_size in gpu.UNITS:
        products_of_blocks(block_size)


def products_of_blocks(block_size: int) -> None:
    for density, tokens in ((0.0, 5), (0.1, 1), (0.35, 37), (0.7, 70), (1.0, 16)):
        mask = torch.rand(3, 5) < density
        if 0 < density < 1:
            mask[1], mask[:, 3], mask[2, 0] = False, False, True
        check_products(mask, block_size, tokens)
    # A single block row, and a single block column.
    check_products(torch.tensor([[True, False, True]]), block_size, 33)
    check_products(torch.tensor([[True], [False], [True]]), block_size, 33)


def tiles() -> None:
    """Steps and tiles smaller and larger than a block, uneven rows, several splits of the tokens."""
    mask = torch.rand(4, 5) < 0.4
    mask[0], mask[3] = True, False
    for block_size, depth, columns, group in ((16, 64, 16, 1), (32, 16, 16, 2), (32, 32, 32, 4), (64, 32, 32, 1)):
        index, x, weight, dy = layer(mask, block_size, 50)
        tile = Tile(16, columns, depth, warps=4, stages=2, group=group)
        check(gpu.forward(x, weight, None, index, tile), x, weight.t())
        check(gpu.input_gradient(dy, weight, index, tile), dy, weight)
    for block_size, rows, columns, depth in ((16, 32, 16, 64), (32, 64, 16, 16), (64, 16, 64, 32)):
        index, x, weight, dy = layer(mask, block_size, 50)
        tile, bias = Tile(rows, columns, depth, warps=4, stages=2, group=2, swapped=True), torch.randn(len(weight))
        check(gpu.forward(x, weight, bias, index, tile), x, weight.t(), bias)
        check(gpu.input_gradient(dy, weight, index, tile), dy, weight)
    for block_size, rows, columns, depth, splits in (
        *((16, 16, 64, 16, 1), (16, 16, 64, 16, 3), (32, 16, 16, 32, 2)),
        *((32, 32, 64, 32, 2), (64, 32, 32, 32, 1), (64, 64, 128, 32, 5)),
    ):
        index, x, weight, dy = layer(mask, block_size, 83)
        tile = Tile(rows, columns, depth, warps=4, stages=2)
        check_masked(gpu.weight_gradient(dy, x, index, tile, splits), dy, x, expand(mask, block_size))


def inputs() -> None:
    """Tensors that are not contiguous, no tokens at all, infinities, and equal bits in every run."""
    block_size = 16
    mask = torch.rand(3, 4) < 0.6
    mask[:, 2], mask[0, 1] = False, True
    index, x, weight, dy = layer(mask, block_size, 21)
    wide = torch.randn(21, 2 * x.shape[1])[:, : x.shape[1]]
    check(gpu.forward(wide, weight, None, index), wide, weight.t())
    check(gpu.forward(x.t().contiguous().t(), weight.t().contiguous().t(), None, index), x, weight.t())
    assert gpu.forward(x[:0], weight, None, index).shape == (0, weight.shape[0])
    assert (gpu.weight_gradient(dy[:0], x[:0], index) == 0).all()
    # What no active block multiplies cannot reach the result, not even an infinity.
    x[:, 2 * block_size : 3 * block_size] = torch.inf
    for depth in (16, 64):
        assert gpu.forward(x, weight, None, index, Tile(16, 16, depth, warps=4, stages=2)).isfinite().all()
    for columns in (16, 64):
        tile = Tile(16, columns, 16, warps=4, stages=2)
        once, twice = (gpu.weight_gradient(dy, x, index, tile, splits=2) for _ in range(2))
        assert once.isfinite().all() and torch.equal(once, twice)


def autograd() -> None:
    """The public function with this kernel: all gradients, leading dimensions, and the dense gradient."""
    block_size = 16
    mask = torch.rand(3, 4) < 0.5
    index, x, weight, dy = layer(mask, block_size, 30)
    bias = torch.randn(weight.shape[0])
    for dense_gradient in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x.view(5, 6, -1), weight, bias)]
        y = sparse_linear(*leaves, index, dense_gradient, kernel="triton")
        y.backward(dy.view_as(y))
        dx, dweight, dbias = (leaf.grad for leaf in leaves)
        check(y.detach().flatten(0, 1), x, weight.t(), bias)
        check(dx.flatten(0, 1), dy, weight)
        check_masked(dweight, dy, x, torch.ones_like(weight) if dense_gradient else expand(mask, block_size))
        check(dbias[None], torch.ones(1, 30), dy)


def packed() -> None:
    """Packed storage with slots in random order, some of them empty: tiles of all kinds, and through autograd."""
    for block_size in gpu.UNITS:
        for density, tokens in ((0.0, 5), (0.4, 1), (0.4, 37), (1.0, 18)):
            check_packed(block_size, density, tokens)
    for block_size, depth, columns in ((16, 64, 16), (32, 16, 16), (64, 32, 32)):
        check_packed(block_size, 0.6, 50, Tile(16, columns, depth, warps=4, stages=2))
    check_packed(32, 0.6, 50, Tile(64, 32, 32, warps=4, stages=2, swapped=True))
    for block_size, rows, columns, splits in ((16, 16, 64, 1), (16, 16, 64, 3), (32, 16, 16, 2), (64, 64, 128, 2)):
        tile = Tile(rows, columns, 32, warps=4, stages=2)
        check_packed(block_size, 0.6, 83, gradient_tile=tile, splits=splits)
    weight, index = packed_weight((3, 4), 16, torch.float32)
    x, dy, bias = torch.randn(30, 64), torch.randn(30, 48), torch.randn(48)
    leaves = leaf(x.view(5, 6, -1)), leaf(weight), leaf(bias)
    y = packed_linear(*leaves, index, "triton")
    y.backward(dy.view_as(y))
    check(y.detach().flatten(0, 1), x, matrix(weight, index).t(), bias)
    check(leaves[0].grad.flatten(0, 1), dy, matrix(weight, index))
    assert torch.equal(leaves[1].grad, gpu.weight_gradient(dy, x, index))


def check_packed(
    block_size: int,
    density: float,
    tokens: int,
    tile: Tile | None = None,
    *,
    gradient_tile: Tile | None = None,
    splits: int | None = None,
) -> None:
    weight, index = packed_weight((3, 5), block_size, torch.float32, density=density)
    dense, keep = matrix(weight, index), expand(index.mask, block_size)
    x, dy, bias = torch.randn(tokens, dense.shape[1]), torch.randn(tokens, dense.shape[0]), torch.randn(len(dense))
    # An empty slot must not be read: what is there may be anything.
    is_empty = index.slot_blocks < 0
    weight[is_empty] = torch.nan
    check(gpu.forward(x, weight, bias, index, tile), x, dense.t(), bias)
    check(gpu.input_gradient(dy, weight, index, tile), dy, dense)
    once, again = (gpu.weight_gradient(dy, x, index, gradient_tile, splits) for _ in range(2))
    assert once.shape == weight.shape and (once[is_empty] == 0).all() and torch.equal(once, again)
    check_masked(unpack(once, index.slot_blocks, (3, 5)), dy, x, keep)


def tune() -> None:
    """`tune_layer` runs each product with each tile that it measures, and later calls take the winner."""
    seen: list[float] = []

    def falling(run) -> float:
        run()
        seen.append(-len(seen))
        return seen[-1]

    fastest = tuning.tune_layer("cpu", torch.float32, 32, 24, (96, 64), 0.5, measure=falling, limit=3)
    assert len(seen) == 9 and len(fastest) == 3
    problem = tile_cache.Problem(FORWARD, "interpreter", torch.float32, 32, 24, 2, 3)
    assert tile_cache.tile_for(problem) == fastest[FORWARD][0] != default_tile(FORWARD, 32, torch.float32)


CASES = {"products": products, "tiles": tiles, "inputs": inputs, "autograd": autograd, "packed": packed, "tune": tune}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(7)
    for name in sys.argv[1:]:
        CASES[name]()
        print(f"{name}: passed")
