"""A power cut: what was flushed is there, what was not is there or not, by chance.

    recorder = Recorder(folder, records)
    recorder.record_in_this_process()              # in each rank: notes what ``os.fsync`` has made durable
    cut_power(folder, recorder, chance)            # when all ranks are dead: the folder as the disk has it

A file that was flushed has the content of that moment; one that was not is empty, cut off, zeroed or whole. A folder
that was flushed has the names of that moment, or those of its end. So a rename of a file that was never flushed leaves
an empty one, as file systems do.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any


class Recorder:
    """Knows files and folders by the numbers of their inodes, which it keeps from being given to others."""

    def __init__(self, folder: Path, records: Path) -> None:
        self.folder, self.records = folder, records
        records.mkdir(parents=True, exist_ok=True)
        self._held: list[int] = []

    def record_in_this_process(self) -> None:
        """From now on each ``os.fsync`` is noted after it has been done."""
        original = os.fsync

        def fsync(target: Any) -> None:
            original(target)
            self._note(target if isinstance(target, int) else target.fileno())

        os.fsync = fsync

    def content(self, inode: int) -> bytes | None:
        """Of a file when it was flushed last; None: it never was."""
        path = self.records / f"file-{inode}"
        return path.read_bytes() if path.exists() else None

    def names(self, inode: int) -> dict[str, int] | None:
        """Of the entries of a folder when it was flushed last, with their inodes."""
        path = self.records / f"folder-{inode}"
        return json.loads(path.read_text()) if path.exists() else None

    def _note(self, descriptor: int) -> None:
        status, path = os.fstat(descriptor), Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self.folder):
            return
        if stat.S_ISDIR(status.st_mode):
            self._held.append(os.dup(descriptor))
            self._write(f"folder-{status.st_ino}", json.dumps(entries(path)).encode())
        else:
            held = self.records / f"held-{status.st_ino}"
            if not held.exists():
                os.link(path, held)
            self._write(f"file-{status.st_ino}", path.read_bytes())

    def _write(self, name: str, content: bytes) -> None:
        temporary = self.records / f"new-{os.getpid()}-{name}"
        temporary.write_bytes(content)
        temporary.rename(self.records / name)


def entries(folder: Path) -> dict[str, int]:
    """Names in a folder and their inodes."""
    with os.scandir(folder) as found:
        return {entry.name: entry.inode() for entry in found}


def cut_power(folder: Path, recorder: Recorder, chance: random.Random) -> None:
    """Replace a folder by what the disk has of it. Its own entry in its parent counts as flushed."""
    paths = {path.lstat().st_ino: path for path in folder.rglob("*")} if folder.exists() else {}
    rebuilt = folder.with_name(f"{folder.name}-after")
    rebuilt.mkdir()
    if folder.exists():
        _rebuild(folder.stat().st_ino, folder, rebuilt, paths, recorder, chance)
        shutil.rmtree(folder)
    rebuilt.rename(folder)


def _rebuild(
    inode: int, now: Path | None, to: Path, paths: dict[int, Path], recorder: Recorder, chance: random.Random
) -> None:
    flushed, current = recorder.names(inode) or {}, entries(now) if now is not None and now.is_dir() else {}
    for name, number in sorted((current if chance.random() < 0.5 else flushed).items()):
        path, target = paths.get(number), to / name
        if recorder.names(number) is not None or (path is not None and path.is_dir()):
            target.mkdir()
            _rebuild(number, path, target, paths, recorder, chance)
        else:
            target.write_bytes(_content(number, path, recorder, chance))


def _content(inode: int, now: Path | None, recorder: Recorder, chance: random.Random) -> bytes:
    flushed = recorder.content(inode)
    current = now.read_bytes() if now is not None and now.is_file() else None
    if flushed is not None:
        return chance.choice([flushed, flushed if current is None else current])
    if not current:
        return b""
    return chance.choice([b"", current[: chance.randrange(len(current))], bytes(len(current)), current])
