"""Times of passes on a device that works behind the host: its own seconds, and the host's apart."""

from __future__ import annotations

import time

import pytest
from fake_device import FakeDevice

from megasparse.kernels.common.medians import DeviceStopwatch, medians


class Pass:
    """Work of so many milliseconds, which the host needs `host` seconds to hand out. Meanwhile the device, unless it
    has more to do than that, comes to the end of its queue and waits."""

    def __init__(self, device: FakeDevice, milliseconds: float, host: float) -> None:
        self.device, self.milliseconds, self.host, self.runs = device, milliseconds, host, 0

    def __call__(self) -> None:
        self.runs += 1
        time.sleep(self.host)
        idle = 1e3 * self.host - (self.device.queued - self.device.done)
        if idle >= 0:
            self.device.work(idle)
            self.device.catch_up()
        self.device.work(self.milliseconds)


def stopwatch(device: FakeDevice) -> DeviceStopwatch:
    return DeviceStopwatch(device.new_event, lambda: device.work(1.0), device.synchronize)


def test_a_pass_is_measured_as_if_the_host_were_fast() -> None:
    device = FakeDevice()
    slow, fast = Pass(device, 3.0, host=0.02), Pass(device, 5.0, host=0.0)
    of_slow, of_fast = medians([slow, fast], "cuda", 3, stopwatch(device))
    assert of_slow.device == pytest.approx(0.003) and of_slow.host >= 0.02
    assert of_fast.device == pytest.approx(0.005) and of_fast.host < 0.02
    assert slow.runs >= 2 * (3 + 1), "first it was measured at the pace of the host"


def test_a_host_that_is_never_ahead_is_given_up_on() -> None:
    device = FakeDevice()

    def synchronous() -> None:
        device.work(2.0)
        device.catch_up()

    assert stopwatch(device)(synchronous).device == pytest.approx(0.002)


def test_on_a_cpu_host_and_device_are_one() -> None:
    (seconds,) = medians([lambda: time.sleep(0.005)], "cpu", 3)
    assert seconds.device == seconds.host >= 0.005
