"""Learning rate over steps: linear warm-up, then cosine, linear, warm-up-stable-decay or constant."""

from __future__ import annotations

import math

from megasparse.config.schema import OptimizerConfig, RunConfig
from megasparse.sparsity.schedule import first_dense_step


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig, decay_start: int | None = None) -> float:
    """Base learning rate of optimizer step `step` (0-based) of `steps`.

    decay_start: step up to which the rate stays at its peak; None: as the schedule has it.
    """
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    start = max(optimizer.warmup_steps, decay_start or 0)
    if optimizer.schedule == "constant" or step < start:
        return optimizer.lr
    lowest = optimizer.lr * optimizer.min_lr_ratio
    share = (step - start) / max(steps - start, 1)
    if optimizer.schedule == "cosine":
        return lowest + (optimizer.lr - lowest) * (1 + math.cos(math.pi * share)) / 2
    if optimizer.schedule == "linear":
        return optimizer.lr + (lowest - optimizer.lr) * share
    assert optimizer.schedule == "wsd", optimizer.schedule
    decay_steps = max(optimizer.decay_fraction * steps if decay_start is None else steps - start, 1)
    return optimizer.lr + (lowest - optimizer.lr) * max(0.0, 1 - (steps - step) / decay_steps)


def decay_start(config: RunConfig) -> int | None:
    """The step in which a topology update makes the model dense for good, where `optimizer.decay_start` asks for it.

    None where the decay starts as the schedule has it, as in runs that are dense from their beginning.
    """
    return (first_dense_step(config) or None) if config.optimizer.decay_start == "dense" else None
