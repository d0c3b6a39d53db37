"""Logs of JSON objects, one a line: written line by line, and read whatever has happened to them.

log = JsonLinesWriter(folder / "metrics.jsonl")
log.write({"step": 10, "loss": 2.5})

lines, damaged = read_json_lines(folder / "metrics.jsonl")       # damaged: [7] where line 7 is none
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megasparse.utils.files import failures_named

MAX_NAMED = 8
"""Numbers of lines that a message names."""


class JsonLine(NamedTuple):
    """A line that is whole. number: from 1; content: its bytes, without the line end."""

    number: int
    content: bytes
    values: dict[str, Any]


class JsonLinesWriter:
    """Adds lines to a file, each at once. Raises OSError that names the file where it cannot be written, where it is a
    symbolic link, or where somebody has deleted or replaced it since it was opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        try:
            self._file = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(error.errno, "is a symbolic link; must be a file", str(path)) from None
            raise

    def write(self, values: Mapping[str, Any]) -> None:
        with failures_named(self.path):
            self._check_place()
            size, content = os.fstat(self._file).st_size, f"{json.dumps(values)}\n".encode()
            try:
                while content:
                    content = content[os.write(self._file, content) :]
            except OSError:
                # No half of a line is left for others to read.
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, size)
                raise

    def close(self) -> None:
        os.close(self._file)

    def _check_place(self) -> None:
        """What is written into a file without a name is lost, and no error says so."""
        try:
            if os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._file)):
                return
            reason = "was replaced by another file"
        except FileNotFoundError:
            reason = "was deleted"
        raise FileNotFoundError(errno.ENOENT, f"{reason} while the run wrote it", str(self.path))


def read_json_lines(path: Path) -> tuple[list[JsonLine], list[int]]:
    """The lines that are objects with a whole number `step`, and the numbers of those that are not: cut off, no UTF-8,
    no JSON. Empty lines are skipped."""
    found, damaged = [], []
    for number, content in enumerate(path.read_bytes().split(b"\n"), 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content)
            if not isinstance(values["step"], int) or isinstance(values["step"], bool):
                raise TypeError
            found.append(JsonLine(number, content, values))
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    return found, damaged


def name_lines(numbers: Sequence[int]) -> str:
    """`line 7`, or `lines 7, 9`."""
    named = ", ".join(map(str, numbers[:MAX_NAMED])) + (" ..." if len(numbers) > MAX_NAMED else "")
    return f"line{'s' if len(numbers) > 1 else ''} {named}"
