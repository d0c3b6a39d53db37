"""One run at a time in a run folder.

    with hold_folder(folder, note=print):           # rank 0, before anything in the folder is changed
        ...

A run holds a lock of the system (flock) on `run.lock`, which says host, process and start. The system frees it when the
process ends, however that happens, so a file that a killed run has left behind hinders nobody. Over NFS Linux turns the
lock into one that the server keeps, which holds between hosts; a server frees that of a host that has crashed after its
lease, 90 s as a rule, so that a run whose owner is on another host waits that long before it is refused. Where a file
system knows no locks (Lustre without `-o flock`), a warning says that two runs would not be noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from megasparse.config.loader import ConfigError
from megasparse.utils.files import failures_named, make_folders

LOCK = "run.lock"
LEASE_SECONDS = 120.0
"""After which a server has freed the locks of a host that has crashed."""
POLL_SECONDS = 0.5
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def hold_folder(folder: Path, note: Callable[[str], None], lease_seconds: float = LEASE_SECONDS) -> Iterator[None]:
    """Keep other runs out of the folder, which is made where it is missing; what stays empty is removed at the end.

    note: told of waiting, and of a file system without locks. Raises ConfigError where another run holds the folder,
    OSError where it cannot be written.
    """
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    path, deadline = folder / LOCK, None
    try:
        while (handle := _try_lock(path, note)) is None:
            owner = owner_of(folder)
            elsewhere = owner is not None and not owner.startswith(f"host {socket.gethostname()}, ")
            if deadline is None:
                deadline = time.monotonic() + (lease_seconds if elsewhere else 1.0)
                if elsewhere:
                    note(f"waiting up to {lease_seconds:g} s for {path}, which is held by {owner}")
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"run.name: {folder.absolute()} is in use by another run: {owner or 'one that has just begun'}; "
                    "must be another run.name, or wait until that run has ended"
                )
            time.sleep(POLL_SECONDS)
        try:
            with failures_named(path):
                _write_owner(handle)
            yield
        finally:
            _release(handle, path)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


def owner_of(folder: Path) -> str | None:
    """Who holds the folder or, where nobody does, who held it and was killed; None where nobody says."""
    try:
        values = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"host {values['host']}, process {values['process']}, since {values['since']}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _try_lock(path: Path, note: Callable[[str], None]) -> int | None:
    """An open file that is locked; None where another process holds it."""
    make_folders(path.parent)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        # Another process has just removed a folder that it had made.
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_open_at(handle, path):
            return handle
    except BlockingIOError:
        pass
    except OSError as error:
        if error.errno in UNSUPPORTED:
            note(f"{path} cannot be locked here ({error.strerror}): a second run would not be noticed")
            return handle
        os.close(handle)
        raise OSError(error.errno, error.strerror, str(path)) from error
    # Held by another process, or removed by it between our opening and locking.
    os.close(handle)
    return None


def _is_open_at(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    return False


def _write_owner(handle: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
    os.ftruncate(handle, 0)
    os.pwrite(handle, (json.dumps(owner) + "\n").encode(), 0)


def _release(handle: int, path: Path) -> None:
    """Removed while it is held: whoever has opened it meanwhile sees that it is gone."""
    if _is_open_at(handle, path):
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(handle)
