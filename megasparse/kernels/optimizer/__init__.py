"""AdamW where most of a matrix is inactive: the update and the gradient norm go through active blocks only.

    adamw_(State(master, exp_avg, exp_avg_sq), gradient, settings, Active(mask, block_size, start))
    total = square_sum(gradient, Active(mask, block_size, start))

Tensors are pieces of flat matrices, entries [start, start + numel) of one. ``cpu`` computes both, in C++, in one pass
over memory; ``reference`` says what is computed. Where it cannot run, torch's own AdamW goes over all weights.
"""

from __future__ import annotations

from megasparse.kernels.optimizer import cpu
from megasparse.kernels.optimizer.cpu import adamw_, square_sum
from megasparse.kernels.optimizer.reference import MAX_WEIGHT_STEPS, Active, AdamWStep, State
from megasparse.kernels.optimizer.sm3 import sm3_

KERNELS = ("auto", "torch", "cpu")

__all__ = ["KERNELS", "MAX_WEIGHT_STEPS", "Active", "AdamWStep", "State", "adamw_", "sm3_", "square_sum", "takes_cpu"]


def takes_cpu(kernel: str, device: str) -> bool:
    """Whether the C++ kernel steps on a type of device. Raises RuntimeError where `cpu` is asked for and cannot."""
    if kernel == "torch":
        return False
    reason = cpu.why_not(device)
    if kernel == "cpu" and reason is not None:
        raise RuntimeError(f"kernels.optimizer: cpu cannot be used: {reason}")
    return reason is None
