"""The block-sparse products against float64: dtypes, block sides, token counts, topologies, strides, both storages.

Every entry has a bound of its own: a sum of K products of inputs is off by at most K + 2 roundings of the sum of their
magnitudes, and by one rounding to the dtype of the result. Tensor cores cut off instead of rounding, and keep two bits
less of each summand: four times the rounding of float32 there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from megasparse.kernels.block_sparse import assign_slots, build_index, gpu, pack, sparse_linear, unpack
from megasparse.kernels.block_sparse.index import BlockIndex
from megasparse.kernels.block_sparse.tiles import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, swapped_tile
from megasparse.utils.activations import ACTIVATIONS
from megasparse.utils.dtypes import dtype_name

AUTOGRAD = "autograd"
PACKED = {f"packed {name}": name for name in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)}
SWAPPED = {f"swapped {name}": name for name in (FORWARD, INPUT_GRADIENT)}
ACTIVATED = {f"activated {name}": name for name in (FORWARD, INPUT_GRADIENT)}
PRODUCTS = (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, AUTOGRAD, *PACKED, *SWAPPED, *ACTIVATED)
ACTIVATION = "gelu"
# (tokens, topology, inputs): one token, odd counts, whole tiles, several splits of the tokens; rows without and with
# all blocks; matrices that are cut out of wider ones, or transposed.
SITUATIONS = (
    (515, "random", "contiguous"),
    (37, "random", "cut out"),
    (1, "random", "transposed"),
    (64, "full", "contiguous"),
    (33, "empty", "contiguous"),
    (4099, "random", "contiguous"),
)
SEED = 11


@dataclass(frozen=True)
class ProductCase:
    """One product at one dtype and block."""

    product: str
    dtype: torch.dtype
    block: int
    tokens: int
    topology: str
    inputs: str
    grid: tuple[int, int]
    """Block rows and columns."""

    name = "product"

    @property
    def settings(self) -> dict[str, Any]:
        words = {"product": self.product, "dtype": dtype_name(self.dtype), "block": self.block}
        return words | {"tokens": self.tokens, "topology": self.topology, "inputs": self.inputs}

    @property
    def variant(self) -> str:
        return f"{self.product}, {dtype_name(self.dtype)}, blocks of {self.block}"

    def launch(self, device: str) -> Tensor:
        return self._run(_Layer(self, device))

    def compare(self, device: str) -> dict[str, float]:
        layer = _Layer(self, device)
        got, again = self._run(layer), self._run(layer)
        return excess(got, *layer.expected(self.product)) | unequal(got, again)

    def _run(self, layer: _Layer) -> Tensor:
        return layer.products()[self.product]()


class _Layer:
    """Inputs of a case, and what its products must be."""

    def __init__(self, case: ProductCase, device: str) -> None:
        self.case, block, (rows, columns) = case, case.block, case.grid
        torch.manual_seed(SEED)
        mask = torch.rand(rows, columns) < {"random": 0.35, "full": 2.0, "empty": 0.0}[case.topology]
        if case.topology == "random":
            mask[0], mask[1], mask[:, -1] = True, False, False
        self.index: BlockIndex = build_index(mask.to(device), block)
        self.keep = self.index.mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
        self.x = _matrix(case.tokens, columns * block, case, device)
        self.dy = _matrix(case.tokens, rows * block, case, device)
        self.bias = torch.randn(rows * block, device=device).to(case.dtype)
        self.weight = torch.randn(self.keep.shape, device=device).to(case.dtype) * self.keep
        # Two slots more than there are blocks, all in random order.
        slots = assign_slots(mask, self.index.num_active + 2)
        self.slots = slots[torch.randperm(len(slots))].to(device)

    def products(self) -> dict[str, Callable[[], Tensor]]:
        # What is in an inactive block must not be read.
        poisoned = self.weight.masked_fill(~self.keep, torch.nan)
        return {
            FORWARD: lambda: gpu.forward(self.x, poisoned, self.bias, self.index),
            INPUT_GRADIENT: lambda: gpu.input_gradient(self.dy, poisoned, self.index),
            WEIGHT_GRADIENT: lambda: gpu.weight_gradient(self.dy, self.x, self.index),
            AUTOGRAD: self._by_autograd,
            **self._packed_products(),
            **self._swapped_products(poisoned),
            **self._activated_products(poisoned),
        }

    def _swapped_products(self, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
        tile = swapped_tile(self.case.block)
        results = (
            lambda: gpu.forward(self.x, weight, self.bias, self.index, tile),
            lambda: gpu.input_gradient(self.dy, weight, self.index, tile),
        )
        return dict(zip(SWAPPED, results, strict=True))

    def _activated_products(self, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
        """Behind the product, and before its input, which is then the activation of x."""
        z = self.x.contiguous()
        results = (
            lambda: gpu.activated_forward(self.x, weight, self.bias, self.index, ACTIVATION)[1],
            lambda: gpu.activated_input_gradient(self.dy, weight, self.index, ACTIVATION, z),
        )
        return dict(zip(ACTIVATED, results, strict=True))

    def _packed_products(self) -> dict[str, Callable[[], Tensor]]:
        index = build_index(self.index.mask, self.case.block, slot_blocks=self.slots)
        # What is in an empty slot must not be read either.
        blocks = pack(self.weight, self.slots, self.case.block)
        blocks = blocks.masked_fill((self.slots < 0)[:, None, None], torch.nan)
        results = (
            lambda: gpu.forward(self.x, blocks, self.bias, index),
            lambda: gpu.input_gradient(self.dy, blocks, index),
            lambda: unpack(gpu.weight_gradient(self.dy, self.x, index), self.slots, self.case.grid),
        )
        return dict(zip(PACKED, results, strict=True))

    def _by_autograd(self) -> Tensor:
        """The weight gradient by the public function."""
        leaf = self.weight.clone().requires_grad_()
        y = sparse_linear(self.x, leaf, self.bias, self.index, kernel="triton")
        return torch.autograd.grad(y, leaf, self.dy)[0]

    def expected(self, product_name: str) -> tuple[Tensor, Tensor]:
        """The product in float64, and the bound of each entry."""
        if product_name in ACTIVATED:
            product_name = ACTIVATED[product_name]
            return activated(*self.expected(product_name), None if product_name == FORWARD else self.x, self.case.dtype)
        product_name = (PACKED | SWAPPED).get(product_name, product_name)
        x, dy, weight = self.x.double(), self.dy.double(), self.weight.double()
        if product_name == FORWARD:
            return bounded(x, weight.t(), self.case.dtype, plus=self.bias.double())
        if product_name == INPUT_GRADIENT:
            return bounded(dy, weight, self.case.dtype)
        expected, bound = bounded(dy.t(), x, self.case.dtype)
        # Exactly zero in inactive blocks: no error at all is allowed there.
        return expected * self.keep, bound * self.keep


def cases(rehearse: bool) -> list[ProductCase]:
    if rehearse:
        situations = ((5, "random", "cut out"), (18, "full", "contiguous"))
        return [
            ProductCase(name, torch.float32, block, *situation, (3, 3))
            for (block, situation), name in product(zip((32, 16), situations, strict=True), PRODUCTS)
        ]
    return [
        ProductCase(name, dtype, block, *situation, (10, 14) if block <= 32 else (5, 7))
        for situation in SITUATIONS
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for block in gpu.UNITS
        for name in (PRODUCTS if situation == SITUATIONS[1] else PRODUCTS[:3])
        # Swapped operands are for tensor cores and large blocks.
        if name not in SWAPPED or dtype != torch.float32 and block >= 64
    ]


def bounded(a: Tensor, b: Tensor, dtype: torch.dtype, plus: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """a b + plus of float64 matrices, and the bound of each entry for kernels of a dtype."""
    expected, largest = a @ b, a.abs() @ b.abs()
    if plus is not None:
        expected, largest = expected + plus, largest + plus.abs()
    rounding = 2**-24 if dtype == torch.float32 else 2**-22
    limits = torch.finfo(dtype)
    bound = (a.shape[1] + 2) * rounding * largest
    if dtype != torch.float32:
        bound += limits.eps / 2 * (expected.abs() + bound) + limits.smallest_normal * limits.eps
    return expected, bound


def activated(expected: Tensor, bound: Tensor, z: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """f of a product in float64, or f'(z) times it, and the bound of each entry; those of the product are given."""
    with torch.enable_grad():
        leaf = (expected if z is None else z.double()).detach().requires_grad_()
        value = ACTIVATIONS[ACTIVATION].function(leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    result = value.detach() if z is None else expected * slope
    # No slope of GELU exceeds 1.13. Its own arithmetic is some roundings of float32.
    limits = torch.finfo(dtype)
    bound = 1.13 * bound + 2**-20 * expected.abs()
    return result, bound + limits.eps / 2 * (result.abs() + bound) + limits.smallest_normal * limits.eps


def excess(got: Tensor, expected: Tensor, bound: Tensor) -> dict[str, float]:
    """The largest error over its bound; NaN where the result has one."""
    if not got.numel():
        return {"error_over_bound": 0.0}
    # A bound of zero allows no error: the smallest number keeps 0 / 0 away.
    ratio = (got.double() - expected).abs() / (bound + 1e-300)
    return {"error_over_bound": float("nan") if bool(ratio.isnan().any()) else float(ratio.max())}


def unequal(*pairs: Tensor) -> dict[str, float]:
    """How many entries of two results differ in their bits."""
    got, again = pairs
    return {"unequal_bits": float((got != again).sum())}


def _matrix(rows: int, columns: int, case: ProductCase, device: str) -> Tensor:
    made = torch.randn(rows, columns, device=device).to(case.dtype)
    if case.inputs == "cut out":
        # No row begins at a multiple of 16 bytes.
        wide = torch.full((rows, columns + 3), torch.nan, device=device, dtype=case.dtype)
        wide[:, 1 : columns + 1] = made
        return wide[:, 1 : columns + 1]
    return made.t().contiguous().t() if case.inputs == "transposed" else made
