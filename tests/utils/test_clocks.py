"""Clocks, the device's with events of a device that works behind the host."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from fake_device import FakeDevice

from megasparse.cost.ledger import Ledger
from megasparse.utils import clocks
from megasparse.utils.clocks import DeviceClock, HostClock


def test_parts_of_a_step_are_the_devices_and_read_with_one_wait() -> None:
    device, ledger = FakeDevice(), Ledger()
    ledger.seconds.use_device(lambda add: DeviceClock(add, device.new_event))
    for _ in range(5):
        with ledger.seconds.step():
            with ledger.seconds.part("forward"):
                device.work(200)
            device.work(50)
            with ledger.seconds.part("backward"):
                device.work(400)
    assert device.waits == 0 and ledger.seconds.total == 0
    wanted = {"forward": 1.0, "backward": 2.0, "other": 0.25, "data": 0, "optimizer": 0, "topology": 0}
    assert ledger.by_part() == pytest.approx(wanted)
    assert device.waits == 1 and ledger.seconds.total == pytest.approx(3.25)
    assert ledger.by_part() == pytest.approx(wanted) and device.waits == 1
    assert Ledger.from_state(ledger.state()) == ledger


def test_events_are_used_again_and_do_not_pile_up(monkeypatch) -> None:
    monkeypatch.setattr(clocks, "MAX_PENDING", 8)
    device, seconds = FakeDevice(), Counter()
    clock = DeviceClock(lambda name, value: seconds.update({name: value}), device.new_event)
    for _ in range(100):
        with clock.span("forward"):
            device.work(10)
        # The host lags behind by itself now and then: nobody waits.
        device.catch_up()
    assert device.waits == 0 and device.events <= 2 * 10
    clock.settle()
    assert seconds["forward"] == pytest.approx(1.0)


def test_a_piece_that_fails_is_counted() -> None:
    device, seconds = FakeDevice(), Counter()
    for clock in (
        DeviceClock(lambda name, value: seconds.update({name: value}), device.new_event),
        HostClock(lambda name, value: seconds.update({f"{name} of the host": value})),
    ):
        with pytest.raises(ZeroDivisionError), clock.span("forward"):
            device.work(30)
            time.sleep(0.01)
            raise ZeroDivisionError
        clock.settle()
    assert seconds["forward"] == pytest.approx(0.03) and seconds["forward of the host"] >= 0.01
