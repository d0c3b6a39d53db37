"""Checkpoint folders of a run: written under a temporary name, renamed when whole; found and pruned.

    checkpoints/
      step-00000100/
        index.json                what it is, and where every entry lies, see ``index``
        rank-00000.safetensors    a rank's fragments of weights and moments; rank 0's holds the masks too
        ...
      partial-step-00000200/      one that is being written, or that never was finished

Only real folders named `step-` and digits are checkpoints; whatever else lies there is left alone. A folder without an
index, or with a file that is missing or of another size, is passed over.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megasparse.utils.files import sync_folder

FORMAT = 2
FORMAT_OF_MANY = 3
"""Of checkpoints whose index is a tree, see ``joined``."""
INDEX = "index.json"
OLD_MANIFEST = "manifest.json"
"""Of format 1, which is not read."""
PREFIX = "step-"
CHECKPOINTS = "checkpoints"
"""Folder of them in a run folder."""
NAME = re.compile(rf"{PREFIX}[0-9]{{8,}}")
PARTIAL = re.compile(rf"partial-{PREFIX}[0-9]{{8,}}")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and what is wrong."""


class CheckpointStore:
    """The checkpoints below one folder. Only rank 0 calls the methods that write or delete."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def begin(self, step: int) -> Path:
        """An empty temporary folder to write into; left-overs of interrupted saves are removed.

        Raises OSError where the run folder, which holds all checkpoints, is not there.
        """
        if not self.folder.is_dir():
            self.folder.mkdir(exist_ok=True)
            sync_folder(self.folder.parent)
        self.clear()
        self.partial(step).mkdir()
        return self.partial(step)

    def clear(self) -> None:
        """Remove what is left of interrupted saves."""
        for leftover in self._named(PARTIAL):
            shutil.rmtree(leftover)

    def commit(self, step: int, is_good: Callable[[Path], bool]) -> Path:
        """Turn the temporary folder of `step` into a checkpoint, then drop the oldest ones beyond `keep`.

        Its files must have reached the disk. is_good: whether a folder is a whole checkpoint; others do not count.
        """
        partial, final = self.partial(step), self.folder / self.name(step)
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise CheckpointError(f"{final} is in the way: it is no folder")
        sync_folder(partial)
        if final.exists():
            aside = self.partial(step).with_name(f"partial-{final.name}0")
            os.replace(final, aside)
            os.replace(partial, final)
            shutil.rmtree(aside)
        else:
            os.replace(partial, final)
        # Old ones go only when the new one would survive a power cut.
        sync_folder(self.folder)
        good = 0
        for folder in self.folders():
            is_whole = is_good(folder)
            if good >= self.keep and folder != final:
                # Under another name first: one that is deleted by halves would look like a damaged checkpoint.
                going = folder.with_name(f"partial-{folder.name}")
                os.replace(folder, going)
                shutil.rmtree(going)
            good += is_whole
        return final

    def abandon(self, step: int) -> None:
        """Remove the temporary folder of a save that failed."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def folders(self) -> list[Path]:
        """Checkpoints and what looks like them, newest first."""
        return sorted(self._named(NAME), key=lambda folder: int(folder.name.removeprefix(PREFIX)), reverse=True)

    def partial(self, step: int) -> Path:
        return self.folder / f"partial-{self.name(step)}"

    @staticmethod
    def name(step: int) -> str:
        return f"{PREFIX}{step:08d}"

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        if not self.folder.is_dir():
            return []
        with os.scandir(self.folder) as entries:
            return [
                self.folder / entry.name
                for entry in entries
                if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]


def size_problem(path: Path, size: int) -> str:
    """How a file differs from one of this size; empty where it does not."""
    try:
        found = path.stat()
    except OSError:
        return "is missing"
    if not stat.S_ISREG(found.st_mode):
        return "is missing"
    return "" if found.st_size == size else f"has {found.st_size} bytes instead of {size}"


def check_model(folder: Path, saved: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise CheckpointError unless the saved section `model` is this one, naming every field that differs."""
    differences = [
        f"model.{name} is {saved.get(name)!r} there and {value!r} here"
        for name, value in model.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(f"checkpoint {folder} does not fit: {'; '.join(differences)}")


def sha256(path: Path) -> str:
    """Checksum of a file, read piece by piece; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
