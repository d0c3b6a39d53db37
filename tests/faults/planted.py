"""What is planted in a rank before it runs: something happens at a chosen call of a function of the product.

at_call("megasparse.training.checkpoints:write_part", 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any


def wrap(target: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(original, *arguments)`` in the place of a function.

    target: `module:name` or `module:Class.name`, as its callers see it.
    """
    module, _, name = target.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(original, *arguments, **named)

    setattr(owner, last, wrapped)


def at_call(target: str, number: int, action: Callable[[], None], *, when: str = "before", delay: float = 0.0) -> None:
    """Let `action` happen at the call of this number, from 1, in this process.

    when: `before` the call, `after` it, or `within`: in a thread, `delay` seconds after it has begun.
    """
    calls = [0]
    lock = threading.Lock()

    def wrapper(original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        with lock:
            calls[0] += 1
            due = calls[0] == number
        if due and when == "before":
            action()
        if due and when == "within":
            threading.Thread(target=lambda: (time.sleep(delay), action()), daemon=True).start()
        result = original(*arguments, **named)
        if due and when == "after":
            action()
        return result

    wrap(target, wrapper)
