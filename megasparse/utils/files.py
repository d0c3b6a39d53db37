"""Writing files so that a name never stands for half-written data: write beside the target, sync, rename.

    write_at_once(folder / "sample.txt", text)
    write_json(folder / "summary.json", {"steps": 24})
    with new_file(folder / "weights.bin") as file:          # in a folder that itself takes its name at the end
        file.write(content)

What cannot be written is an ``OSError`` that names the file, whatever call of the system has failed;
``describe_failure`` says it in words. No symbolic link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def describe_failure(error: OSError) -> str:
    """`path: reason`, without the number of the error; what the error says where it names no path."""
    return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)


@contextlib.contextmanager
def failures_named(path: Path) -> Iterator[None]:
    """Failures of the system inside name `path`: those of an open file name none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.strerror:
            raise
        raise _named(error, path) from error


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


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which must not be there yet; after the block its content has reached the disk."""
    with failures_named(path), path.open("xb") as file:
        try:
            yield file
            sync_and_close(file)
        except BaseException:
            # Closing writes again what has failed, and would fail again.
            with contextlib.suppress(OSError):
                file.close()
            raise


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
    """Makes what has been written to the files of these names in a folder durable. Links that lead nowhere are none."""
    for path in filter(Path.is_file, folder.glob(pattern)):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)


def write_at_once(path: Path, content: str | bytes, *, make_folder: bool = True) -> None:
    """Writes or replaces a whole file atomically, text as UTF-8.

    make_folder: where it is missing; False: a folder that somebody has deleted meanwhile must not come back. A symbolic
    link at `path` is replaced, and what it leads to is left alone.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    if make_folder:
        make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with new_file(temporary) as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, values: Any, *, indent: int = 1, allow_nan: bool = True, make_folder: bool = True) -> None:
    """Writes or replaces a JSON file atomically; nothing is written where `values` cannot be JSON."""
    write_at_once(path, json.dumps(values, indent=indent, allow_nan=allow_nan) + "\n", make_folder=make_folder)


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno or errno.EIO, error.strerror or str(error), str(path))
