"""Which kernel computes a sparse linear layer: forced by name, or by measured break-even densities.

``choose`` decides for one layer at one density; ``check_forced`` tells before a run whether a forced kernel can serve,
``explain`` which kernel `auto` would use at low densities, or why there is none.

`planned`, where a function takes it: nothing is compiled, and the device need not be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from megasparse.kernels.block_sparse import cpu, gpu
from megasparse.kernels.block_sparse.break_even import measured
from megasparse.kernels.common.compiling import constant_when_compiled

KERNELS = ("auto", "dense", "reference", "cpu", "triton")

WhyNot = Callable[[str, torch.dtype, int, bool], str | None]

# Backends that save work, with the reason why they cannot run on (device type, dtype, unit), or None; it may be asked
# for a plan.
WHY_NOT: Mapping[str, WhyNot] = MappingProxyType({"cpu": cpu.why_not, "triton": gpu.why_not})


def choose(
    kernel: str,
    device: str,
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    density: float,
    widths: tuple[int, int] | None = None,
    *,
    break_even: float | None = None,
    is_packed: bool = False,
    planned: bool = False,
) -> str:
    """The backend that `kernel` stands for.

    Args:
        kernel: a name from `KERNELS`; `auto`: the fastest one that supports the layer.
        device: device type, `cpu` or `cuda`.
        dtype: of input and weight.
        block_size: side of the square units.
        tokens: rows of the input.
        density: share of active units.
        widths: (in, out) of the layer; None: nothing is known of them.
        break_even: density above which dense products are used; None: as measured.
        is_packed: the weight is in packed storage. Dense products would first put it together, so they are taken
            only where no other kernel supports the layer.

    Raises:
        ValueError: unknown kernel, or a forced one that cannot run here.
    """
    check_name(kernel)
    if kernel != "auto":
        check_forced(kernel, device, dtype, block_size, planned=planned)
        return kernel

    def fastest(planned: bool) -> str:
        name, _ = explain(device, dtype, block_size, planned=planned)
        if name is None:
            return "dense"
        if is_packed:
            return name
        limit = measured(name, device, dtype, block_size, tokens, widths) if break_even is None else break_even
        return name if density <= limit else "dense"

    # First without a build: nothing is compiled, in the midst of a step perhaps, that would not be used.
    return "dense" if fastest(planned=True) == "dense" else fastest(planned)


@constant_when_compiled
def explain(device: str, dtype: torch.dtype, block_size: int, *, planned: bool = False) -> tuple[str | None, str]:
    """(The backend that saves work there, "") or (None, the reasons why none does)."""
    reasons = []
    for name, why_not in WHY_NOT.items():
        reason = why_not(device, dtype, block_size, planned)
        if reason is None:
            return name, ""
        reasons.append(f"{name}: {reason}")
    return None, "; ".join(reasons)


def check_name(kernel: str) -> None:
    """Raise ValueError for a name that is no kernel."""
    if kernel not in KERNELS:
        raise ValueError(f"block_sparse kernel: {kernel!r} is unknown; must be one of {', '.join(KERNELS)}")


def check_forced(kernel: str, device: str, dtype: torch.dtype, block_size: int, *, planned: bool = False) -> None:
    """Raise ValueError where a kernel that was asked for by name cannot run."""
    check_name(kernel)
    place = device, dtype, block_size, planned
    reason = WHY_NOT[kernel](*place) if kernel in WHY_NOT else None
    if reason is not None:
        runs = [k for k in KERNELS if k not in WHY_NOT or WHY_NOT[k](*place) is None]
        raise ValueError(f"block_sparse kernel: {kernel!r} cannot run: {reason}; here it must be {', '.join(runs)}")
