"""The elementwise Triton kernels, run by Triton's interpreter on the CPU, against torch's operators in float64.

Run by test_elementwise_triton.py in a process of its own, as TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megasparse.kernels.elementwise import activation, gpu, normalize_sum, rotate  # noqa: E402
from megasparse.utils.activations import ACTIVATIONS  # noqa: E402

# A few roundings of float32, relative to the largest entry.
TOLERANCE = 2e-6


def check(function, inputs: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Results and all gradients of `function(kernel, *inputs)`, and equal bits in a second run."""
    found = [_run(function, "triton", inputs) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    for got, wanted in zip(found[0], _run(function, "torch", [x.double() for x in inputs]), strict=True):
        assert got.dtype == torch.float32 and got.shape == wanted.shape
        error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{error:.2e}"


def _run(function, kernel: str, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    results = function(kernel, *leaves)
    results = results if isinstance(results, tuple) else (results,)
    torch.manual_seed(5)
    gradients = [torch.randn(each.shape).to(each.dtype) for each in results]
    return [*(each.detach() for each in results), *torch.autograd.grad(results, leaves, gradients)]


def gates() -> None:
    kind = ACTIVATIONS["swiglu"]

    def gate(kernel: str, x: Tensor) -> Tensor:
        return activation("swiglu", kind.function, gated=True, kernel=kernel)(x)

    for shape in ((1, 1, 2), (2, 3, 14), (5, 128), (3, 2 * gpu.GATE_COLUMNS + 6)):
        check(gate, [3 * torch.randn(shape)])
    x = torch.tensor([0.0, 88.0, -88.0, 1e4, -1e4, torch.nan, *[1.0] * 6])
    y = gate("triton", x)
    assert y[[0, 2, 4]].abs().max() < 1e-30 and y[1] == 88 and y[3] == 1e4 and y[5].isnan()
    assert gate("triton", torch.zeros(0, 6)).shape == (0, 3)


def rotations() -> None:
    for B, H, T, D in ((1, 1, 1, 2), (2, 3, 5, 10), (2, 2, 37, 64)):
        angles = torch.randn(T, D // 2)
        tables = angles.cos(), angles.sin()

        def turn(kernel: str, x: Tensor, tables: tuple[Tensor, ...] = tables) -> Tensor:
            return rotate(x, *(table.to(x.dtype) for table in tables), kernel=kernel)

        wide = torch.randn(B, T, 3 * H * D)
        check(turn, [torch.randn(B, H, T, D)])
        check(turn, [wide[..., H * D : 2 * H * D].view(B, T, H, D).transpose(1, 2)])
        check(turn, [torch.randn(B, H, T, 2 * D)[..., ::2]])
    # Tables that are a part of longer ones, as in generation.
    angles = torch.randn(9, 4)
    x = torch.randn(1, 2, 1, 8)
    parts = angles.cos()[7:8], angles.sin()[7:8]
    assert torch.allclose(rotate(x, *parts, kernel="triton"), rotate(x, *parts, kernel="torch"), atol=1e-6)


def sums() -> None:
    """The mean is far from 0: what lies beyond the end of a row must not count. Programs have a row, or several."""
    gpu.GRADIENT_PROGRAMS = 4
    for shape in ((1, 1, 3), (3, 64), (2, 5, 100)):
        for kind in ("rmsnorm", "layernorm", "layernorm with bias"):

            def apply(kernel: str, *inputs: Tensor, kind: str = kind) -> tuple[Tensor, Tensor]:
                x, added, weight, *bias = inputs
                return normalize_sum(x, added, weight, *(bias or [None]), 1e-5, kind.split()[0], kernel=kernel)

            rows = [torch.randn(shape) + 2, torch.randn(shape) + 2]
            # Differences of entries of about 4.
            check(apply, [*rows, *torch.randn(2 if kind.endswith("bias") else 1, shape[-1])], 8 * TOLERANCE)


def only_one_result_is_used() -> None:
    leaves = [torch.randn(4, 8).requires_grad_() for _ in range(2)]
    total, y = normalize_sum(*leaves, torch.ones(8), None, 1e-5, "rmsnorm", kernel="triton")
    found = [torch.autograd.grad(each.sum(), leaves, retain_graph=True) for each in (total, y)]
    exact = normalize_sum(*leaves, torch.ones(8), None, 1e-5, "rmsnorm", kernel="torch")
    for each, result in zip(found, exact, strict=True):
        right = torch.autograd.grad(result.sum(), leaves, retain_graph=True)
        assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(each, right, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(7)
    for case in (gates, rotations, sums, only_one_result_is_used):
        case()
        print(f"{case.__name__}: passed")
