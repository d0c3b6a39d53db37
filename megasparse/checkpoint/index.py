"""The index of a checkpoint, ``index.json``: what it is, and which entries of which parameters lie in which file.

Of many ranks it lists indexes of groups of them instead of their files, see ``joined``.

    index = read_index(folder)                 # CheckpointError names what is missing, cut off or altered
    write_index(index, folder)

It carries a checksum of itself, so that a changed number is found as surely as a changed weight.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megasparse.checkpoint.order import Run
from megasparse.checkpoint.rank_file import FilePart
from megasparse.checkpoint.store import FORMAT, FORMAT_OF_MANY, INDEX, OLD_MANIFEST, CheckpointError, size_problem
from megasparse.utils.files import write_at_once


@dataclass(frozen=True)
class SavedParameter:
    """A parameter as it is saved."""

    shape: tuple[int, ...]
    bands: int = 1
    """Bands of columns, see ``order``; 1: row-major."""
    grid: tuple[int, int] | None = None
    """Of a matrix of which blocks are saved only, [slots, block_size, block_size]: its rows and columns of blocks."""

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """As the model has it where nothing is packed."""
        if self.grid is None:
            return self.shape
        return self.grid[0] * self.shape[1], self.grid[1] * self.shape[2]


@dataclass(frozen=True)
class SavedFile:
    """A file, and the runs of entries that each of its tensors holds, one after another."""

    part: FilePart
    runs: dict[str, list[Run]]
    """By `<kind>/<parameter>`; tensors that belong to no parameter are left out."""


@dataclass(frozen=True)
class Index:
    """A whole checkpoint but for its tensors."""

    step: int
    model: dict[str, Any]
    """Section `model` of the configuration."""
    optimizer_step: int
    """Updates that the optimizer has made; 0: there are no moments."""
    train_state: dict[str, Any]
    window_losses: list[float]
    """The mean over the ranks of their sums of losses since the last line of metrics; each rank's own is in its file.
    Older checkpoints list all of them here."""
    loss_scaler: dict[str, float]
    layout: dict[str, int]
    """How the run lay on its ranks: `world_size`, `tensor_parallel_size`, `zero_stage`; any other may read it."""
    parameters: dict[str, SavedParameter]
    """In the order of the model."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Further names of shared parameters in the model's state dict, and the names that they go by above."""
    files: dict[str, SavedFile] = field(default_factory=dict)


def write_index(index: Index, folder: Path) -> None:
    values = asdict(index)
    for entry in values["parameters"].values():
        if entry["grid"] is None:
            del entry["grid"]
    content = json.dumps(values, allow_nan=True)
    # An earlier version would take the index of a group for the file of a rank.
    number = FORMAT_OF_MANY if any(not name.endswith(".safetensors") for name in index.files) else FORMAT
    text = f'{{"format": {number}, "checksum": "{_checksum(content)}", "content":\n{content}\n}}\n'
    write_at_once(folder / INDEX, text, make_folder=False)


def read_index(folder: Path) -> Index:
    """Raises CheckpointError where the folder is no whole checkpoint, as far as the index and the sizes of the files
    that it lists tell."""
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
        document = json.loads(text)
        found, content = document["format"], text.partition('"content":\n')[2].rpartition("\n}")[0]
        if found in (FORMAT, FORMAT_OF_MANY) and document["checksum"] != _checksum(content):
            raise CheckpointError(f"checkpoint {folder}: {INDEX} does not have its checksum; it was changed")
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {_why_missing(folder, error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {folder}: {INDEX} is not readable: {error}") from None
    if found not in (FORMAT, FORMAT_OF_MANY):
        raise CheckpointError(f"checkpoint {folder}: format {found!r}; must be {FORMAT} or {FORMAT_OF_MANY}")
    try:
        index = _parse(document["content"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {INDEX} is not readable: {error!r}") from None
    check_sizes(folder, index.files)
    return index


def check_sizes(folder: Path, files: Mapping[str, SavedFile]) -> None:
    """Raise CheckpointError where a listed file is missing or of another size."""
    for name, file in files.items():
        if problem := size_problem(folder / name, file.part.bytes):
            raise CheckpointError(f"checkpoint {folder}: {name} {problem}")


def file_entry(part: FilePart, runs: Mapping[str, list[Run]]) -> dict[str, Any]:
    """A rank's part of the index, as JSON."""
    return asdict(SavedFile(part, dict(runs)))


def parse_file(values: Mapping[str, Any]) -> SavedFile:
    """What ``file_entry`` gave."""
    runs = {
        key: [Run(int(run["start"]), int(run["numel"])) for run in listed] for key, listed in values["runs"].items()
    }
    return SavedFile(FilePart(int(values["part"]["bytes"]), str(values["part"]["checksum"])), runs)


def parse_files(values: Mapping[str, Any]) -> dict[str, SavedFile]:
    """Files by name, from JSON. Raises ValueError, KeyError, TypeError or AttributeError for what is no such thing."""
    return {_file_name(name): parse_file(entry) for name, entry in values.items()}


def _parse(values: dict[str, Any]) -> Index:
    files = parse_files(values.pop("files"))
    parameters = {
        name: SavedParameter(tuple(entry["shape"]), int(entry["bands"]), _grid(entry.get("grid")))
        for name, entry in values.pop("parameters").items()
    }
    return Index(files=files, parameters=parameters, **values)


def _grid(values: list[int] | None) -> tuple[int, int] | None:
    return None if values is None else (int(values[0]), int(values[1]))


def _file_name(name: str) -> str:
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is no name of a file in the folder")
    return name


def _why_missing(folder: Path, error: OSError) -> str:
    if (folder / OLD_MANIFEST).is_file():
        return "was written by an early version, in DeepSpeed's files; must be one of this version: start the run anew"
    if isinstance(error, FileNotFoundError):
        return f"{INDEX} is missing, so it was never finished"
    return f"{INDEX} is not readable: {error.strerror}"


def _checksum(content: str) -> str:
    return f"{zlib.crc32(content.encode()):08x}"
