"""Leaving cleanly: a signal is noted here, agreed on by all ranks, and acted on at the end of a step.

with StopSignal(mesh) as stop:
    while ...:
        train_step()
        if stop.agreed():
            save(); break
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from megasparse.parallel import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Notes SIGTERM, SIGUSR1 and the first SIGINT while it is open; a second SIGINT interrupts at once."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._previous: dict[int, Any] = {}
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. All ranks must call it at the same step."""
        return self._mesh.agree_any(self.received is not None)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
