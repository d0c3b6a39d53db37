"""All kinds of faults by name; `SELECTED` are those of `make test`."""

from __future__ import annotations

from collections.abc import Callable

import moments
from attempt import Attempt

KINDS: dict[str, Callable[[Attempt], None]] = {
    "kill in a step": moments.kill_in(moments.OF_A_STEP),
    "kill in a save": moments.kill_in(moments.OF_A_SAVE),
    "kill in a start": moments.kill_in(moments.OF_A_START),
    "kill at the end": moments.kill_in(moments.OF_THE_END),
    "kill at any time": moments.kill_at_any_time,
    "signal in a step": moments.signal_in(moments.OF_A_STEP),
    "signal in a save": moments.signal_in(moments.OF_A_SAVE),
    "signal in a start": moments.signal_in(moments.OF_A_START),
    "signal at the end": moments.signal_in(moments.OF_THE_END),
    "signal at any time": moments.signal_at_any_time,
    "Ctrl-C twice": moments.signal_twice,
}
SELECTED: list[tuple[str, int]] = []
