"""Writing files so that a name never stands for half-written data: write beside the target, sync, rename.

write_at_once(folder / "sample.txt", text)
write_json(folder / "summary.json", {"steps": 24})
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import IO, Any


def temporary_beside(path: Path) -> Path:
    """A new empty file in the folder of `path`, from where a rename to `path` is atomic.

    Unlike the files of ``tempfile``, which only their owner may read, it has the permissions of the user's umask.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    temporary.touch(exist_ok=False)
    return temporary


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


def make_folders(folder: Path) -> None:
    """Makes a folder, and those above it, where missing; they survive a power cut."""
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_files(folder: Path, pattern: str) -> None:
    """Makes what has been written to the files of these names in a folder durable."""
    for path in folder.glob(pattern):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


def write_at_once(path: Path, content: str | bytes) -> None:
    """Writes or replaces a whole file atomically, text as UTF-8; makes the folder where missing.

    A symbolic link at `path` is replaced, and what it leads to is left alone.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    make_folders(path.parent)
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


def write_json(path: Path, values: Any, *, indent: int = 1, allow_nan: bool = True) -> None:
    """Writes or replaces a JSON file atomically; nothing is written where `values` cannot be JSON."""
    write_at_once(path, json.dumps(values, indent=indent, allow_nan=allow_nan) + "\n")
