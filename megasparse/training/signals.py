"""Leaving cleanly: a signal is noted here, told to all ranks, and acted on at the end of a step.

with StopSignal() as stop:
    while ...:
        norm, losses, is_asked = engine.gradient_norm_and(values, asks=stop.received is not None)
        ...
        if is_asked:
            save(); break

Ranks tell each other with the gradient norm: what comes after that in a step, stops the next one.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and the first SIGINT while it is open; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
