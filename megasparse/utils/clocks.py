"""Seconds that pieces of work take: on a host that does them itself, or on a device that works behind the host.

    clock = HostClock(add)                # add("forward", 0.12) is called with the seconds of each piece
    clock = DeviceClock(add)              # the same on a CUDA device, by its own events
    with clock.span("forward"):
        ...
    clock.settle()                        # all that was timed so far has been added

A host that hands out work measures how fast it hands it out. To wait for the device around every piece would leave it
idle meanwhile; events in its queue cost a few microseconds, and are read long after they have passed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

Add = Callable[[str, float], None]
"""Takes the name of a piece and its seconds."""

MAX_PENDING = 1024
"""Spans kept before those that have passed are read; steps of many micro-batches hold a few hundred."""


class Clock(Protocol):
    def span(self, name: str) -> Any:
        """A context; pieces may lie within each other."""
        ...

    def settle(self) -> None: ...


class Event(Protocol):
    """As torch.cuda.Event; times are milliseconds."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class HostClock:
    """Adds the seconds of a piece as soon as it ends."""

    def __init__(self, add: Add) -> None:
        self._add = add

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - started)

    def settle(self) -> None:
        """All has been added."""


def timing_event() -> Event:
    return torch.cuda.Event(enable_timing=True)


class DeviceClock:
    """Records events on the current stream around each piece, and waits for the device in ``settle`` alone.

    new_event: makes an event with timing.
    """

    def __init__(self, add: Add, new_event: Callable[[], Event] = timing_event) -> None:
        self._add, self._new_event = add, new_event
        self._pending: deque[tuple[str, Event, Event]] = deque()
        """In the order in which they end, which is that of the stream."""
        self._free: list[Event] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start, end = self._event(), self._event()
        start.record()
        try:
            yield
        finally:
            end.record()
            self._pending.append((name, start, end))
            if len(self._pending) > MAX_PENDING:
                self._read_passed()

    def settle(self) -> None:
        """Wait until the device has done all that was timed, once."""
        if self._pending:
            self._pending[-1][2].synchronize()
            self._read_passed()

    def _event(self) -> Event:
        return self._free.pop() if self._free else self._new_event()

    def _read_passed(self) -> None:
        while self._pending and self._pending[0][2].query():
            name, start, end = self._pending.popleft()
            self._add(name, start.elapsed_time(end) / 1e3)
            self._free += [start, end]
