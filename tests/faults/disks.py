"""Disks that fail: a power cut, a disk that is full or read-only, a run folder that is deleted."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attempt import LOST, SILENT, Attempt
from comparison import newest_step
from forked_ranks import Ranks
from moments import OF_A_SAVE
from planted import at_call, wrap
from power import Recorder, cut_power
from tiny_run import STEPS

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "link", "symlink")
"""Functions of `os` that change a folder."""


def power_cut(attempt: Attempt) -> None:
    """At a moment of a save, or after the end: what was not flushed is lost, or is not. What was committed is there."""
    chance = attempt.chance
    attempt.begin_new()
    recorder = Recorder(attempt.folder / "runs", attempt.folder / "flushed")
    target = chance.choice(list(OF_A_SAVE))
    call, rank = chance.randint(1, OF_A_SAVE[target]), chance.randrange(attempt.layout.ranks)
    attempt.fault = f"power cut before call {call} of {target} of rank {rank}, or at the end"
    cut = attempt.folder / "cut"

    def prepare(own: int) -> None:
        recorder.record_in_this_process()
        wrap("megasparse.checkpoint.store:CheckpointStore.commit", _marked(attempt.folder / "committed"))
        if own == rank:
            at_call(target, call, cut.touch)

    def watch(ranks: Ranks, _: float) -> None:
        if cut.exists():
            for one in range(attempt.layout.ranks):
                ranks.signal(one, signal.SIGKILL)

    attempt.start(prepare=prepare, meanwhile=watch, deaths=True)
    marks = attempt.folder / "committed"
    committed = int(marks.read_text()) if marks.exists() else 0
    cut_power(attempt.folder / "runs", recorder, chance)
    attempt.fault += f"; step {committed} was committed"
    found = newest_step(attempt.run)
    if found < committed:
        attempt.found.append((LOST, f"step {committed} was committed, after the power cut {found} is the newest"))
    attempt.finish()


def disk_full(attempt: Attempt) -> None:
    _failing_disk(attempt, errno.ENOSPC)


def read_only(attempt: Attempt) -> None:
    _failing_disk(attempt, errno.EROFS)


def folder_deleted(attempt: Attempt) -> None:
    """At any time: noticed with a sentence, or, before the run has begun there, without consequence."""
    chance = attempt.chance
    attempt.begin_new()
    at, gone = attempt.random_time(0.2), [chance.choice(["runs/run", "runs/run/checkpoints"])]
    attempt.fault = f"{gone[0]} is deleted after {at:.2f} s"
    path, at_deletion = attempt.folder / gone[0], list[int]()

    def delete(_: Ranks, seconds: float) -> None:
        if gone and seconds > at and path.is_dir():
            gone.clear()
            at_deletion.append(newest_step(attempt.run))
            shutil.rmtree(path, ignore_errors=True)

    ended = attempt.start(meanwhile=delete)
    if any(ended.statuses):
        attempt.finish()
    elif at_deletion and newest_step(attempt.run) < STEPS:
        # After the last commit nothing is written there any more.
        if at_deletion[0] < STEPS:
            attempt.found.append((SILENT, "the run ended well, and its folder is gone"))
    else:
        attempt.compare(ended)


def _failing_disk(attempt: Attempt, number: int) -> None:
    """From some write on nothing can be written in the run folder, for the whole run or for a while."""
    chance = attempt.chance
    attempt.begin_anywhere()
    first = int(2 ** chance.uniform(0, 10))
    last = chance.choice([first + int(2 ** chance.uniform(0, 8)), 10**9])
    rank = chance.choice([0, 0, attempt.layout.ranks - 1])
    attempt.fault = f"{os.strerror(number)} from write {first} to {last} of rank {rank}"

    def prepare(own: int) -> None:
        if own == rank:
            FailingDisk(attempt.folder / "runs", number, first, last).install()

    ended = attempt.start(prepare=prepare)
    if any(ended.statuses):
        attempt.finish()
    else:
        # A checkpoint that could not be written was told, and training went on.
        told = "warning" in ended.text or "not saved" in ended.text
        attempt.compare(ended)
        if told and any(outcome == SILENT for outcome, _ in attempt.found):
            attempt.found = [one for one in attempt.found if one[0] != SILENT]
            shutil.rmtree(attempt.run)
            attempt.finish()


class FailingDisk:
    """In this process writes and changes below a folder fail with an error, from the first to the last one named.

    It stands before Python's own functions: files that native code opens are not seen.
    """

    def __init__(self, folder: Path, number: int, first: int, last: int) -> None:
        self._folder, self._number, self._first, self._last = str(folder), number, first, last
        self._writes = 0
        self._raw: set[int] = set()
        """Descriptors of files below the folder."""

    def install(self) -> None:
        original = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if not set(mode) & set("wax+") or not self._is_below(file):
                return original(file, mode, *arguments, **named)
            self.write(file)
            return _File(original(file, mode, *arguments, **named), lambda: self.write(file))

        io.open = builtins.open = opened
        for name in CHANGES:
            self._guard(name)
        original_open = os.open

        def opened_raw(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._is_below(path):
                self.write(path)
                own = original_open(path, flags, *arguments, **named)
                self._raw.add(own)
                return own
            return original_open(path, flags, *arguments, **named)

        original_write = os.write

        def written_raw(own: int, content: Any) -> int:
            if own in self._raw:
                self.write(os.readlink(f"/proc/self/fd/{own}"))
            return original_write(own, content)

        os.open, os.write = opened_raw, written_raw

    def write(self, path: Any) -> None:
        """Count a write, and let it fail where it is its turn."""
        self._writes += 1
        if self._first <= self._writes <= self._last:
            raise OSError(self._number, os.strerror(self._number), str(path))

    def _guard(self, name: str) -> None:
        original = getattr(os, name)

        def guarded(path: Any, *arguments: Any, **named: Any) -> Any:
            # A full disk lets files be removed.
            if self._is_below(path) and not (name in ("unlink", "rmdir") and self._number == errno.ENOSPC):
                self.write(path)
            return original(path, *arguments, **named)

        setattr(os, name, guarded)

    def _is_below(self, path: Any) -> bool:
        return not isinstance(path, int) and os.path.abspath(os.fspath(path)).startswith(self._folder)


class _File:
    """A file whose writes are announced."""

    def __init__(self, file: Any, announce: Callable[[], None]) -> None:
        self._file, self._announce = file, announce

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        self._announce()
        return self._file.write(content)


def _marked(path: Path) -> Callable[..., Any]:
    """Notes the step of each commit that has returned."""

    def commit(original: Callable[..., Any], store: Any, step: int, *arguments: Any) -> Any:
        result = original(store, step, *arguments)
        path.write_text(str(step))
        return result

    return commit
