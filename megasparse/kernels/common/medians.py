"""Median times of training passes, which take turns: a machine that is busy for a while is unfair to none of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def training_pass(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], None]:
    """A forward and backward pass of `function` through autograd, as training runs it."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, dy)

    return run


def medians(passes: Sequence[Callable[[], None]], device: str, rounds: int) -> list[float]:
    """Median seconds of each pass over the rounds, in which they take turns; one more round warms up."""
    times: list[list[float]] = [[] for _ in passes]
    for number in range(rounds + 1):
        for own, run in zip(times, passes, strict=True):
            elapsed = _seconds(run, device)
            if number:
                own.append(elapsed)
    return [statistics.median(own) for own in times]


def _seconds(run: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
