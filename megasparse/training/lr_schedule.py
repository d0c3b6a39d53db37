"""Learning rate over steps: linear warm-up, then cosine, linear, warm-up-stable-decay or constant."""

from __future__ import annotations

import math

from megasparse.config.schema import OptimizerConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Base learning rate of optimizer step `step` (0-based) of `steps`."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    lowest = optimizer.lr * optimizer.min_lr_ratio
    share = (step - optimizer.warmup_steps) / max(steps - optimizer.warmup_steps, 1)
    if optimizer.schedule == "constant":
        return optimizer.lr
    if optimizer.schedule == "cosine":
        return lowest + (optimizer.lr - lowest) * (1 + math.cos(math.pi * share)) / 2
    if optimizer.schedule == "linear":
        return optimizer.lr + (lowest - optimizer.lr) * share
    assert optimizer.schedule == "wsd", optimizer.schedule
    decay_steps = max(optimizer.decay_fraction * steps, 1)
    return optimizer.lr + (lowest - optimizer.lr) * max(0.0, 1 - (steps - step) / decay_steps)
