"""Median times of training passes, which take turns: a machine that is busy for a while is unfair to none of them.

    dense, ours = medians(passes, "cuda", rounds=5)
    ours.device, ours.host                     # seconds: of the work, and of the host that hands it out

On a CPU both are one. On a GPU a kernel saves device time only; whether the host hands the pass out as fast is a matter
of the whole step, so it is told apart.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megasparse.utils.clocks import Event, timing_event

FLUSHED_BYTES = 2**28
"""Several times the L2 cache of any GPU, 50 MB on an H100."""

MAX_FLUSHES = 500
"""A device takes about a thousand launches ahead of time; more would block the host."""


class Seconds(NamedTuple):
    """Of one pass."""

    device: float
    host: float


Stopwatch = Callable[[Callable[[], None]], Seconds]


def training_pass(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> Callable[[], None]:
    """A forward and backward pass of `function` through autograd, as training runs it."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> None:
        torch.autograd.grad(function(*leaves), leaves, dy)

    return run


def medians(
    passes: Sequence[Callable[[], None]],
    device: str,
    rounds: int,
    stopwatch: Stopwatch | None = None,
    *,
    fastest: bool = False,
) -> list[Seconds]:
    """Median seconds of each pass over the rounds, in which they take turns; one more round warms up.

    stopwatch: measures one pass; None: that of the device type. fastest: of the fastest round instead, which few rounds
    on a busy machine tell better.
    """
    measure = stopwatch or (DeviceStopwatch() if device == "cuda" else on_host)
    times: list[list[Seconds]] = [[] for _ in passes]
    for number in range(rounds + 1):
        for own, run in zip(times, passes, strict=True):
            elapsed = measure(run)
            if number:
                own.append(elapsed)
    statistic: Callable[[Sequence[float]], float] = min if fastest else statistics.median
    return [Seconds(*map(statistic, zip(*own, strict=True))) for own in times]


def on_host(run: Callable[[], None]) -> Seconds:
    """Of a pass that the host computes itself."""
    started = time.perf_counter()
    run()
    elapsed = time.perf_counter() - started
    return Seconds(elapsed, elapsed)


class DeviceStopwatch:
    """Measures a pass between two events of the device, which finds all of it in its queue.

    A device that waits for the host between two kernels would be measured at the speed of the host. So it is kept busy
    until the pass is handed out: by flushing its cache, as between two layers of a model, as often as that takes.
    flush, synchronize: None: of the current CUDA device.
    """

    def __init__(
        self,
        new_event: Callable[[], Event] = timing_event,
        flush: Callable[[], object] | None = None,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
    ) -> None:
        self._new_event, self._synchronize = new_event, synchronize
        if flush is None:
            flush = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_
        self._flush = flush
        flush()  # compiles and loads
        self._flush_seconds = max(self._between_events(lambda: [flush() for _ in range(10)])[0].device / 10, 1e-6)

    def __call__(self, run: Callable[[], None]) -> Seconds:
        """Measures twice where the host was slower than the device was kept busy."""
        flushes = 1
        while True:
            seconds, was_ahead = self._between_events(run, flushes)
            if was_ahead or flushes == MAX_FLUSHES:
                return seconds
            needed = math.ceil(2 * seconds.host / self._flush_seconds)
            flushes = min(max(needed, 2 * flushes), MAX_FLUSHES)

    def _between_events(self, run: Callable[[], object], flushes: int = 0) -> tuple[Seconds, bool]:
        """Seconds, and whether all was handed out before the device began."""
        self._synchronize()
        for _ in range(flushes):
            self._flush()
        start, end = self._new_event(), self._new_event()
        start.record()
        started = time.perf_counter()
        run()
        host = time.perf_counter() - started
        was_ahead = not start.query()
        end.record()
        self._synchronize()
        return Seconds(start.elapsed_time(end) / 1e3, host), was_ahead
