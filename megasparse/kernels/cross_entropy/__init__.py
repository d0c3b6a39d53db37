"""The cross entropy of logits, and its gradient in their place.

    losses_N = cross_entropy_(logits_NW, targets_N, width, wants_gradient=True, kernel="auto")

Kernels: `torch`, the operators of torch, everywhere; `cpu`, a C++ kernel that goes through the logits once, for
float32, bfloat16 and float16 on CPUs; `auto`, the latter where it can run. A traced program (``torch.compile``) always
has torch's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megasparse.kernels.cross_entropy import cpu, reference

KERNELS = ("auto", "torch", "cpu")


def cross_entropy_(
    logits_NW: Tensor,
    targets_N: Tensor,
    width: int,
    wants_gradient: bool,
    *,
    joined: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
    kernel: str = "auto",
) -> Tensor:
    """See ``reference.cross_entropy_``. Raises RuntimeError where `cpu` is asked for and cannot be used."""
    product = cpu if takes_cpu(kernel, logits_NW) else reference
    return product.cross_entropy_(logits_NW, targets_N, width, wants_gradient, joined)


def takes_cpu(kernel: str, logits_NW: Tensor) -> bool:
    """Whether the C++ kernel computes these logits. Raises RuntimeError where `cpu` is asked for and cannot."""
    if kernel == "torch" or torch.compiler.is_compiling():
        return False
    known = logits_NW.dtype in cpu.TYPES
    reason = cpu.why_not(logits_NW.device.type) if known else f"dtype {logits_NW.dtype}"
    if kernel == "cpu" and reason is not None:
        raise RuntimeError(f"kernels.loss: cpu cannot be used: {reason}")
    return reason is None
