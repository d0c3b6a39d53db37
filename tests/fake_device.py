"""A device that works behind the host, and its events: for what takes times on GPUs."""

from __future__ import annotations


class FakeDevice:
    """Takes as many milliseconds for each piece of work as it is told; is done with nothing before somebody waits for
    it, or lets it `catch_up`."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0
        self.events = self.waits = 0

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def catch_up(self) -> None:
        self.done = self.queued

    def synchronize(self) -> None:
        self.waits += 1
        self.catch_up()

    def new_event(self) -> FakeEvent:
        self.events += 1
        return FakeEvent(self)


class FakeEvent:
    """As torch.cuda.Event."""

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.time = device, 0.0

    def record(self) -> None:
        self.time = self.device.queued

    def query(self) -> bool:
        return self.time <= self.device.done

    def synchronize(self) -> None:
        self.device.waits += 1
        self.device.done = max(self.device.done, self.time)

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "torch raises for an event that has not passed"
        return end.time - self.time
