"""Writing files so that a name never stands for half-written data: write beside the target, sync, rename."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO


def temporary_beside(path: Path) -> Path:
    """A new empty file in the folder of `path`, from where a rename to `path` is atomic."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    # mkstemp makes files that only the owner may read; the finished file gets the usual permissions.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    return Path(name)


def sync_and_close(file: IO[bytes]) -> None:
    """Closes a file after its content has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_at_once(path: Path, content: bytes) -> None:
    """Writes or replaces a whole file atomically; makes the folder where missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            sync_and_close(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
