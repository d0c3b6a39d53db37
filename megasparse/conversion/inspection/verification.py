"""Checks every file of a saved state, and that its weights keep to its topology; names all that is bad.

for problem in verify(path):
    print(problem.file, problem.reason)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megasparse.checkpoint.compact.manifest import MANIFEST
from megasparse.checkpoint.compact.manifest import read_manifest as read_compact_manifest
from megasparse.checkpoint.model_folder import CHECKSUMS
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.store import CHECKPOINTS, INDEX, CheckpointError, CheckpointStore, sha256, size_problem
from megasparse.checkpoint.tensor_files import read_json
from megasparse.conversion.inspection.description import find_sparse
from megasparse.conversion.inspection.opening import (
    CHECKPOINT,
    COMPACT_FOLDER,
    MODEL_FOLDER,
    RUN,
    Opened,
    kind_of,
    open_any,
)

NOT_ZERO_OUTSIDE = ("fp32", "exp_avg", "exp_avg_sq")
"""Kinds that are 0 where units are inactive; per-weight steps count on."""


@dataclass(frozen=True)
class Problem:
    file: str
    reason: str


def verify(path: Path) -> list[Problem]:
    """All that is wrong with the folder `path`; of a run with every checkpoint in it.

    Raises CheckpointError where the folder is of no known kind.
    """
    kind = kind_of(path)
    if kind == RUN:
        folders = CheckpointStore(path / CHECKPOINTS, keep=1).folders()[::-1]
        if not folders:
            return [Problem(f"{path / CHECKPOINTS}", "there is no checkpoint")]
        return [problem for folder in folders for problem in _verify_one(folder, CHECKPOINT)]
    return _verify_one(path, kind)


def _verify_one(path: Path, kind: str) -> list[Problem]:
    problems = list(_bad_checkpoint(path) if kind == CHECKPOINT else _bad_files(path, kind))
    if problems:
        # What they hold would only say the same again.
        return problems
    try:
        opened = open_any(path)
        return list(_bad_tensors(opened))
    except ValueError as error:
        return [Problem(str(path), str(error))]


def _bad_checkpoint(path: Path) -> Iterator[Problem]:
    """Everything is read once and compared with its checksums."""
    try:
        saved = Checkpoint(path)
    except CheckpointError as error:
        yield Problem(str(path / INDEX), str(error))
        return
    with saved:
        are_whole = True
        try:
            files = list(saved.files())
        except CheckpointError as error:
            yield Problem(str(path), str(error))
            return
        for file, part in files:
            try:
                saved.check_file(file, part)
            except CheckpointError as error:
                are_whole = False
                yield Problem(str(path / file), str(error).removeprefix(f"{path / file}: "))
        try:
            if are_whole:
                saved.check_slots()
        except ValueError as error:
            yield Problem(str(path), str(error))


def _bad_files(path: Path, kind: str) -> Iterator[Problem]:
    """Files that are missing, cut off, altered or unreadable, by what the folder says of itself."""
    try:
        expected = _expected(path, kind)
    except ValueError as error:
        yield Problem(str(path / (CHECKSUMS if kind == MODEL_FOLDER else MANIFEST)), str(error))
        return
    for name, (size, checksum) in sorted(expected.items()):
        file = path / name
        reason = _bad(file, size, checksum)
        if reason is not None:
            yield Problem(str(file), reason)
    if kind != COMPACT_FOLDER:
        for file in sorted(path.glob("*.safetensors")):
            reason = None if file.name in expected else _unreadable(file)
            if reason is not None:
                yield Problem(str(file), reason)


def _expected(path: Path, kind: str) -> dict[str, tuple[int | None, str]]:
    """Size and checksum of the files, as far as the folder says it."""
    if kind == COMPACT_FOLDER:
        return dict(read_compact_manifest(path).files)
    if kind == MODEL_FOLDER:
        return {name: (size, checksum) for name, (size, checksum) in _files(read_json(path / CHECKSUMS))}
    index = path / "model.safetensors.index.json"
    listed = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    return {str(name): (None, "") for name in listed}


def _files(values: dict[str, Any]) -> list[tuple[str, Any]]:
    files = values.get("files")
    if not isinstance(files, dict):
        raise CheckpointError("it lists no files")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError("it lists files of other folders")
    return list(files.items())


def _bad(file: Path, size: int | None, checksum: str) -> str | None:
    if not file.is_file():
        return "is missing"
    if size is not None and (problem := size_problem(file, size)):
        return problem
    if checksum and sha256(file) != checksum:
        return "does not have its checksum"
    return _unreadable(file)


def _unreadable(file: Path) -> str | None:
    """Why a file cannot be read as what its name says, without running anything from it."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:
                content.keys()
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as error:
        return f"is not readable: {str(error).splitlines()[0]}"
    return None


def _bad_tensors(opened: Opened) -> Iterator[Problem]:
    """Tensors that cannot be put together, and inactive units that are not 0."""
    saved, sparse = opened.saved, find_sparse(opened)
    for name in saved.shapes:
        for kind in saved.kinds(name):
            try:
                tensor = saved.tensor(name, kind)
            except CheckpointError as error:
                yield Problem(f"{opened.folder}: {name}", str(error))
                continue
            if name not in sparse or kind not in NOT_ZERO_OUTSIDE:
                continue
            parameter, mask = sparse[name]
            wrong = int(torch.count_nonzero(tensor[parameter.inactive_entries(mask)]))
            if wrong:
                yield Problem(f"{opened.folder}: {name}", f"{wrong} entries of {kind} of inactive units are not 0")
