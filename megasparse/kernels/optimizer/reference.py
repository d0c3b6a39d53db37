"""What a step of AdamW (Loshchilov and Hutter 2019) computes, in torch's operators over all weights.

``adamw_`` is what the kernels are compared with. Inactive weights, whose gradient, weight and moments are exactly 0,
stay 0 under it, so that kernels may pass over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WEIGHT_STEPS = 2**15 - 1


@dataclass(frozen=True)
class Active:
    """What of a piece is active: the blocks of the matrix where `mask` is true."""

    mask: Tensor
    """bool [R, C], contiguous; the matrix is [R * block_size, C * block_size]."""
    block_size: int
    start: int
    """First entry of the piece in the flat matrix."""


@dataclass(frozen=True)
class State:
    """A piece of the optimizer's state, tensors [numel], all changed in place."""

    master: Tensor
    """float32, as the moments."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_steps: Tensor | None = None
    """int16, steps since each weight was grown; None: all have the count of the step."""
    low: Tensor | None = None
    """The weights that the model computes with: become the master weights, rounded."""

    def narrow(self, start: int, numel: int) -> State:
        """Entries [start, start + numel), as views."""
        steps, low = (None if x is None else x.narrow(0, start, numel) for x in (self.weight_steps, self.low))
        master, first, second = (x.narrow(0, start, numel) for x in (self.master, self.exp_avg, self.exp_avg_sq))
        return State(master, first, second, steps, low)


@dataclass(frozen=True)
class AdamWStep:
    """Numbers of one step."""

    step: int
    """From 1."""
    lr: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    gradient_scale: float = 1.0
    """What gradients are multiplied by first."""
    by_weight: bool = False
    """Moments are corrected by each weight's own count of steps."""
    regrowth_warmup_steps: int = 0
    """The update of a regrown weight is scaled by min(1, steps / this); 0: it is not."""


def adamw_(state: State, gradient: Tensor, numbers: AdamWStep) -> None:
    """One step of all weights of a piece."""
    if numbers.gradient_scale != 1.0 or gradient.dtype != torch.float32:
        gradient = gradient.to(torch.float32) * numbers.gradient_scale
    first, second, steps = state.exp_avg, state.exp_avg_sq, state.weight_steps
    first.lerp_(gradient, 1 - numbers.beta1)
    second.mul_(numbers.beta2).addcmul_(gradient, gradient, value=1 - numbers.beta2)
    if steps is not None:
        # The bound comes first: one more than MAX_WEIGHT_STEPS would wrap around to a negative number.
        steps.clamp_(max=MAX_WEIGHT_STEPS - 1).add_(1)
    if numbers.by_weight and steps is not None:
        count = steps.to(torch.float32)
    else:
        count = torch.tensor(float(numbers.step), device=first.device)
    update = first / correction(numbers.beta1, count)
    update /= (second / correction(numbers.beta2, count)).sqrt_().add_(numbers.epsilon)
    if numbers.regrowth_warmup_steps and steps is not None:
        regrown = steps < min(numbers.step, MAX_WEIGHT_STEPS)
        ramp = (steps.to(torch.float32) / numbers.regrowth_warmup_steps).clamp_(max=1)
        update = torch.where(regrown, update * ramp, update)
    state.master.mul_(1 - numbers.lr * numbers.weight_decay).add_(update, alpha=-numbers.lr)
    if state.low is not None:
        state.low.copy_(state.master)


def correction(beta: float, count: Tensor) -> Tensor:
    """1 - beta^count, by which a moment is too small after so many steps."""
    return 1 - beta**count
