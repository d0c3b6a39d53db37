"""The elementwise kernels against torch's operators in float64: forward, and all gradients.

Results and gradients are compared with the largest entry of each: a few roundings of float32 (2e-5 allows for sums over
2,048 rows), and the rounding of the dtype, of results and of the sum that is normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megasparse.kernels.elementwise import activation, normalize_sum, rotate
from megasparse.utils.dtypes import dtype_name

GATE, ROTATION, SUM_AND_NORM = "gate", "rotation", "sum and norm"
SEED = 13
FLOAT32 = 2e-5
ROUNDINGS = 4
"""Of the dtype, half a unit of the last place each, that may meet in an entry."""
Run = Callable[[str, list[Tensor]], tuple[Tensor, ...]]
"""(kernel, inputs) -> results."""


@dataclass(frozen=True)
class ElementwiseCase:
    """One operator on so many rows of a width."""

    operator: str
    dtype: torch.dtype
    rows: int
    width: int

    name = "elementwise"

    @property
    def settings(self) -> dict[str, Any]:
        words = {"operator": self.operator, "dtype": dtype_name(self.dtype)}
        return words | {"rows": self.rows, "width": self.width}

    @property
    def variant(self) -> str:
        return f"elementwise: {self.operator}, {dtype_name(self.dtype)}, {self.width} wide"

    def launch(self, device: str) -> list[Tensor]:
        run, inputs = self._operator(device)
        return _passes(run, "triton", inputs, self.dtype)

    def compare(self, device: str) -> dict[str, float]:
        run, inputs = self._operator(device)
        found, again = (_passes(run, "triton", inputs, self.dtype) for _ in range(2))
        exact = _passes(run, "torch", [each.double() for each in inputs], self.dtype)
        tolerance = FLOAT32
        if self.dtype != torch.float32:
            tolerance += ROUNDINGS * torch.finfo(self.dtype).eps / 2
        worst, differing = 0.0, 0.0
        for got, other, right in zip(found, again, exact, strict=True):
            error = float((got.double() - right).abs().max() / (right.abs().max() * tolerance))
            # Infinity in place of NaN, which a maximum might pass over.
            worst = max(worst, float("inf") if error != error else error)
            differing += float((got != other).sum())
        return {"error_over_bound": worst, "unequal_bits": differing}

    def _operator(self, device: str) -> tuple[Run, list[Tensor]]:
        torch.manual_seed(SEED)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(self.dtype)

        if self.operator == GATE:
            gate = {name: activation("swiglu", F.silu, gated=True, kernel=name) for name in ("triton", "torch")}
            return lambda kernel, inputs: (gate[kernel](*inputs),), [drawn(self.rows, 2 * self.width)]
        if self.operator == ROTATION:
            angles = torch.randn(self.rows, self.width // 2, device=device)

            def turn(kernel: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
                kind = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
                return (rotate(inputs[0], angles.cos().to(kind), angles.sin().to(kind), kernel=kernel),)

            # As a projection leaves it: three heads beside others.
            wide = drawn(2, self.rows, 5 * self.width)[..., : 3 * self.width]
            return turn, [wide.view(2, self.rows, 3, self.width).transpose(1, 2)]

        def add(kernel: str, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            x, added, weight, bias = inputs
            return normalize_sum(x, added, weight, bias, 1e-5, "layernorm", kernel=kernel)

        rows = [drawn(self.rows, self.width) for _ in range(2)]
        return add, [*rows, drawn(self.width), drawn(self.width)]


def _passes(run: Run, kernel: str, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results and all gradients, for the same gradients of the results in every dtype: they are drawn in `dtype`."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    results = run(kernel, leaves)
    torch.manual_seed(SEED + 1)
    given = [torch.randn(each.shape, device=each.device).to(dtype).to(each.dtype) for each in results]
    return [*(each.detach() for each in results), *torch.autograd.grad(results, leaves, given)]


def cases(rehearse: bool) -> list[ElementwiseCase]:
    if rehearse:
        sizes: tuple[tuple[int, int], ...] = ((5, 6),)
        return [ElementwiseCase(name, torch.float32, *size) for name in _SIZES for size in sizes]
    return [
        ElementwiseCase(name, dtype, *size)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for name, sizes in _SIZES.items()
        for size in sizes
    ]


_SIZES = {
    GATE: ((515, 11008), (1, 100)),
    ROTATION: ((515, 128), (37, 80)),
    SUM_AND_NORM: ((2051, 4096), (515, 1600), (1, 100)),
}
