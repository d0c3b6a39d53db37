"""What lies between the products of a transformer: activations, normalisation, rotary positions.

    act = activation("gelu", function, gated=False, kernel="auto")     # from product to product
    y = normalize(x, weight, bias, epsilon, "rmsnorm", kernel="auto")
    q = rotate(q_BHTD, cos_TD, sin_TD, kernel="auto")

Kernels: `torch`, the operators of torch, everywhere; `cpu`, C++ kernels that go through memory once, for float32,
bfloat16 and float16 on CPUs; `auto`, the latter where they can run. A traced program (``torch.compile``) always has
torch's, which its compiler joins.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasparse.kernels.elementwise import cpu, reference

KERNELS = ("auto", "torch", "cpu")
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
            return (cpu.Gate if gated else cpu.Activate).apply(x, FUSED[name])
        return reference.gate(x, function) if gated else function(x)

    return apply


def normalize(
    x_C: Tensor, weight_C: Tensor, bias_C: Tensor | None, epsilon: float, kind: str, *, kernel: str = "auto"
) -> Tensor:
    """kind: `layernorm`, or `rmsnorm`, which has no bias. The dtype is that of x; sums are float32."""
    assert kind == "layernorm" or bias_C is None
    if takes_cpu(kernel, x_C, weight_C):
        return cpu.Normalize.apply(x_C, weight_C, bias_C, epsilon, kind == "layernorm")
    if kind == "rmsnorm":
        return reference.rms_norm(x_C, weight_C, epsilon)
    return reference.layer_norm(x_C, weight_C, bias_C, epsilon)


def rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor, *, kernel: str = "auto") -> Tensor:
    """Turn queries or keys by the angles of their tokens, see ``reference.rotate``."""
    if takes_cpu(kernel, x_BHTD):
        return cpu.Rotate.apply(x_BHTD, cos_TD, sin_TD)
    return reference.rotate(x_BHTD, cos_TD, sin_TD)


def takes_cpu(kernel: str, *tensors: Tensor) -> bool:
    """Whether the C++ kernels compute these tensors. Raises RuntimeError where `cpu` is asked for and cannot."""
    if kernel == "torch" or torch.compiler.is_compiling():
        return False
    first = tensors[0]
    fits = first.dtype in cpu.TYPES and all(x.dtype == first.dtype for x in tensors)
    reason = cpu.why_not(first.device.type) if fits else f"dtypes {', '.join(str(x.dtype) for x in tensors)}"
    if kernel == "cpu" and reason is not None:
        raise RuntimeError(f"kernels.elementwise: cpu cannot be used: {reason}")
    return reason is None
