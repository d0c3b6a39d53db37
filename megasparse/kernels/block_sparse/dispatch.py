"""Which kernel computes a sparse linear layer: forced by name, or by measured break-even densities.

``choose`` decides for one layer at one density; ``check_forced`` tells before a run whether a forced kernel can serve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

import torch

from megasparse.kernels.block_sparse import cpu, gpu

KERNELS = ("auto", "dense", "reference", "cpu", "triton")

# Backends that save work, with the reason why they cannot run on (device type, dtype, unit), or None.
WHY_NOT: Mapping[str, Callable[[str, torch.dtype, int], str | None]] = MappingProxyType(
    {"cpu": cpu.why_not, "triton": gpu.why_not}
)


@lru_cache(maxsize=4096)
def choose(kernel: str, device: str, dtype: torch.dtype, unit: int, tokens: int, density: float) -> str:
    """The backend that `kernel` stands for.

    Args:
        kernel: a name from `KERNELS`; `auto`: the fastest one that supports the layer.
        device: device type, `cpu` or `cuda`.
        dtype: of input and weight.
        unit: side of the square units.
        tokens: rows of the input.
        density: share of live units.

    Raises:
        ValueError: unknown kernel, or a forced one that cannot run here.
    """
    check_name(kernel)
    if kernel != "auto":
        check_forced(kernel, device, dtype, unit)
        return kernel
    for name, why_not in WHY_NOT.items():
        if why_not(device, dtype, unit) is None and density <= break_even(name, dtype, unit, tokens):
            return name
    return "dense"


def check_name(kernel: str) -> None:
    """Raise ValueError for a name that is no kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"block_sparse kernel: {kernel!r} is unknown; legal values: {', '.join(KERNELS)}")


def check_forced(kernel: str, device: str, dtype: torch.dtype, unit: int) -> None:
    """Raise ValueError where a kernel that was asked for by name cannot run."""
    reason = WHY_NOT[kernel](device, dtype, unit) if kernel in WHY_NOT else None
    if reason is not None:
        legal = ", ".join(name for name in KERNELS if name not in WHY_NOT or WHY_NOT[name](device, dtype, unit) is None)
        raise ValueError(f"block_sparse kernel: {kernel!r} cannot run: {reason}; legal values here: {legal}")


def break_even(backend: str, dtype: torch.dtype, unit: int, tokens: int) -> float:
    """Density above which dense products are faster than `backend`."""
    return 0.8
