"""The index of a checkpoint of many ranks: a tree of files, of which each lists `GROUP_FILES` files at most.

    ranks-00000-00031.json            the files of 32 ranks, with all their runs
    ranks-00000-01023.json            32 such indexes
    index.json                        up to 32 of the largest

    saved = write_joined(folder / name, files)           # what the index above says of it
    files = read_joined(folder / name, saved)            # CheckpointError where it is not what that says

One index of all files would be read by every rank: at 16,384 ranks, gigabytes by each. An index lists of those below it
size, checksum and the runs of entries that they hold together, which are few, as neighbours hold what lies side by
side. So a rank that looks for some entries reads one file of each level, or a few. Up to `GROUP_FILES` ranks are listed
in `index.json` itself.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from megasparse.checkpoint.index import SavedFile, check_sizes, file_entry, parse_files
from megasparse.checkpoint.order import Run
from megasparse.checkpoint.rank_file import FilePart
from megasparse.checkpoint.store import CheckpointError
from megasparse.utils.files import write_at_once

GROUP_FILES = 32
NAME = re.compile(r"ranks?-([0-9]+)(?:-([0-9]+))?\.(?:json|safetensors)")
SUFFIX = ".json"
"""By which the index of a group is told from the file of a rank."""


def is_joined(name: str) -> bool:
    """Whether a file that an index lists is an index itself."""
    return name.endswith(SUFFIX)


def ranks_of(name: str) -> range:
    """The ranks whose files a listed file stands for; none where its name tells of none."""
    found = NAME.fullmatch(name)
    return range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)


def file_name(first: int, end: int | None = None) -> str:
    """Of a rank's file, or of the index of ranks [first, end)."""
    return f"rank-{first:05d}.safetensors" if end is None else f"ranks-{first:05d}-{end - 1:05d}{SUFFIX}"


def members(first: int, end: int, stride: int) -> dict[str, int]:
    """What an index of ranks [first, end) lists: names, each with the rank that writes it. stride: ranks of each."""
    starts = range(first, end, stride)
    return {file_name(at, min(at + stride, end) if stride > 1 else None): at for at in starts}


def top_stride(world_size: int, group_files: int = GROUP_FILES) -> int:
    """Ranks of each file that `index.json` lists."""
    stride = 1
    while stride * group_files < world_size:
        stride *= group_files
    return stride


def write_joined(path: Path, files: Mapping[str, SavedFile]) -> SavedFile:
    """Write an index; when it returns it has reached the disk. Returns what the index above says of it."""
    content = json.dumps({name: file_entry(file.part, file.runs) for name, file in files.items()}).encode()
    write_at_once(path, content, make_folder=False)
    return SavedFile(FilePart(len(content), f"{zlib.crc32(content):08x}"), merged_runs(files.values()))


def read_joined(path: Path, saved: SavedFile) -> dict[str, SavedFile]:
    """What an index lists. Looks at the files that it lists."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    if (len(content), f"{zlib.crc32(content):08x}") != (saved.part.bytes, saved.part.checksum):
        raise CheckpointError(f"{path}: does not have the checksum of the index above it; it was changed")
    try:
        files = parse_files(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable: {error!r}") from None
    if merged_runs(files.values()) != saved.runs:
        raise CheckpointError(f"{path}: its files do not hold what the index above it says")
    check_sizes(path.parent, files)
    return files


def merged_runs(files: Iterable[SavedFile]) -> dict[str, list[Run]]:
    """The runs of several files, those that follow each other as one. Entries that two hold stay two runs."""
    found: dict[str, list[Run]] = {}
    for file in files:
        for key, runs in file.runs.items():
            found.setdefault(key, []).extend(runs)
    return {key: list(_joined(sorted(runs, key=lambda run: (run.start, run.numel)))) for key, runs in found.items()}


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    last: Run | None = None
    for run in runs:
        if last is not None and last.end == run.start:
            last = Run(last.start, last.numel + run.numel)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last
