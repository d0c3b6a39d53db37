"""Where nested plain values differ.

for name, old, new in differences(before, now): ...         # "data.train[0].tokens", 5000, 6000
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def differences(first: Any, second: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Place and both values of whatever differs; None stands for what is missing.

    Dictionaries are compared key by key, and lists of one length item by item.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            yield from differences(first.get(key), second.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from differences(*pair, f"{name}[{number}]")
    elif first != second:
        yield name, first, second


def shown(value: Any) -> str:
    """A value for a message: of a SHA-256 the beginning, of a list of data sets or the like their number."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return f"{len(value)} of them" if isinstance(value, list) and value and isinstance(value[0], dict) else str(value)
