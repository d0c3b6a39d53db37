"""How long a piece of work takes the device, and how long it keeps the host.

    times = DeviceClock().times(lambda: x @ w)          # times.device, times.host: seconds of one call

Calls run back to back on warm caches, as the layers of a model do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

ROUNDS = 3
ROUND_SECONDS = 0.01
"""Device time of one round, about."""
LONGEST_QUEUE = 20
"""Calls in a round: far below the launches that a stream takes before the host must wait for it."""


class Times(NamedTuple):
    """Median seconds of one call."""

    device: float
    host: float


class DeviceClock:
    """On the GPU. The device sleeps while the host queues a round, so that events meet no gap between launches."""

    def times(self, run: Callable[[], Any]) -> Times:
        for _ in range(2):  # compiles, and takes memory
            run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        queued = time.perf_counter() - started
        torch.cuda.synchronize()
        whole = time.perf_counter() - started
        calls = max(2, min(LONGEST_QUEUE, round(ROUND_SECONDS / whole)))
        rounds = [self._round(run, calls, 1.5 * queued * calls + 1e-4) for _ in range(ROUNDS)]
        return Times(*(statistics.median(part) for part in zip(*rounds, strict=True)))

    def _round(self, run: Callable[[], Any], calls: int, sleep: float) -> Times:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Private, and the only sleep of a device that torch has; without it a round may measure the host.
        pause = getattr(torch.cuda, "_sleep", None)
        if pause is not None:
            pause(int(min(sleep, 0.1) * 2e9))  # cycles, at about 2 GHz
        begin.record()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        queued = time.perf_counter() - started
        end.record()
        torch.cuda.synchronize()
        return Times(begin.elapsed_time(end) / 1e3 / calls, queued / calls)


class HostClock:
    """For a rehearsal: one call, by the host's clock."""

    def times(self, run: Callable[[], Any]) -> Times:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        return Times(seconds, seconds)
