"""A lock among the processes of a machine: ``with locked(folder / "build.lock", seconds=300): ...``."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Exclusive among processes; the system frees it when its holder dies. Raises TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{path}: held by another process for {seconds:g} s") from None
                time.sleep(0.05)
        yield
