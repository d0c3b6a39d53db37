"""What lies between the products of a transformer: activations, normalisation, rotary positions.

    act = activation("gelu", function, gated=False, kernel="auto")     # from product to product
    y = normalize(x, weight, bias, epsilon, "rmsnorm", kernel="auto")
    x, y = normalize_sum(x, added, weight, bias, epsilon, "rmsnorm", kernel="auto")
    q = rotate(q_BHTD, cos_TD, sin_TD, kernel="auto")

Kernels: `torch`, the operators of torch, everywhere; `cpu`, C++ kernels that go through memory once, for float32,
bfloat16 and float16 on CPUs; `triton`, the same on GPUs for what torch leaves to several kernels (see ``gpu``), with
torch's for the rest; `auto`, one of the latter where it can run. A traced program (``torch.compile``) always has
torch's, which its compiler joins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasparse.kernels.elementwise import cpu, gpu, reference

KERNELS = ("auto", "torch", "cpu", "triton")
FUSED = {"gelu": "gelu", "swiglu": "silu"}
"""Activations that the C++ kernels know, and the name of their function there; others are torch's."""


def activation(
    name: str, function: Callable[[Tensor], Tensor], *, gated: bool, kernel: str
) -> Callable[[Tensor], Tensor]:
    """What makes of the first product of a perceptron the input of the second.

    name: of the activation; function: what it is, element by element. gated: the function of the first half of the last
    dimension multiplies its second half.
    """

    def apply(x: Tensor) -> Tensor:
        if name in FUSED and takes_cpu(kernel, x):
            return cpu.run(cpu.Gate if gated else cpu.Activate, x, FUSED[name])
        if name == "swiglu" and takes_triton(kernel, x):
            return gpu.Gate.apply(x)
        return reference.gate(x, function) if gated else function(x)

    return apply


def normalize(
    x_C: Tensor, weight_C: Tensor, bias_C: Tensor | None, epsilon: float, kind: str, *, kernel: str = "auto"
) -> Tensor:
    """kind: `layernorm`, or `rmsnorm`, which has no bias. The dtype is that of x; sums are float32."""
    assert kind == "layernorm" or bias_C is None
    if takes_cpu(kernel, x_C, weight_C):
        return cpu.run(cpu.Normalize, x_C, weight_C, bias_C, epsilon, kind == "layernorm")
    if kind == "rmsnorm":
        return reference.rms_norm(x_C, weight_C, epsilon)
    return reference.layer_norm(x_C, weight_C, bias_C, epsilon)


def normalize_sum(
    x_C: Tensor,
    added_C: Tensor,
    weight_C: Tensor,
    bias_C: Tensor | None,
    epsilon: float,
    kind: str,
    *,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + added, and what ``normalize`` makes of it: two tensors of the shape and dtype of x."""
    same_shape = x_C.shape == added_C.shape and x_C.shape[-1] <= gpu.MAX_WIDTH
    if same_shape and takes_triton(kernel, x_C, added_C, weight_C):
        return gpu.NormalizeSum.apply(x_C, added_C, weight_C, bias_C, epsilon, kind == "layernorm")
    total_C = x_C + added_C
    return total_C, normalize(total_C, weight_C, bias_C, epsilon, kind, kernel=kernel)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, kernel: str = "auto") -> Tensor:
    """Turn queries or keys by the angles of their tokens, see ``reference.rotate``."""
    if takes_cpu(kernel, x_BHTD):
        return cpu.run(cpu.Rotate, x_BHTD, cos_TD, sin_TD)
    if takes_triton(kernel, x_BHTD):
        return gpu.Rotate.apply(x_BHTD, cos_TD, sin_TD)
    return reference.rotate(x_BHTD, cos_TD, sin_TD)


def takes_cpu(kernel: str, *tensors: Tensor) -> bool:
    """Whether the C++ kernels compute these tensors. Raises RuntimeError where `cpu` is asked for and cannot."""
    if kernel in ("torch", "triton") or torch.compiler.is_compiling():
        return False
    dtype, device = tensors[0].dtype, tensors[0].device.type
    if dtype not in cpu.TYPES or any(x.dtype != dtype for x in tensors):
        reason: str | None = f"dtypes {', '.join(str(x.dtype) for x in tensors)}"
    else:
        reason = cpu.why_not(device)
    if kernel == "cpu" and reason is not None:
        raise RuntimeError(f"kernels.elementwise: cpu cannot be used: {reason}")
    return reason is None


def takes_triton(kernel: str, *tensors: Tensor) -> bool:
    """Whether the Triton kernels compute these tensors. Raises RuntimeError where `triton` is asked for and cannot."""
    if kernel in ("torch", "cpu") or torch.compiler.is_compiling():
        return False
    first = tensors[0]
    if kernel == "auto" and first.device.type != "cuda":
        return False
    fits = all(x.dtype == first.dtype for x in tensors)
    reason = (
        gpu.why_not(first.device.type, first.dtype) if fits else f"dtypes {', '.join(str(x.dtype) for x in tensors)}"
    )
    if kernel == "triton" and reason is not None:
        raise RuntimeError(f"kernels.elementwise: triton cannot be used: {reason}")
    return reason is None
