"""Checkpoint folders of a run: written under a temporary name, verified, renamed; found, checked and pruned.

    checkpoints/
      latest                      name of the newest folder, for DeepSpeed's own tools
      step-00000100/
        manifest.json             step, layout, model, size of every file, checksum of the topology
        topology.safetensors      mask bits of every layer, 1 bit per unit, independent of the layout
        random.safetensors        states of the random generators, one row per rank
        layout.json               how the parameters are divided over the files, see `layout.py`
        mp_rank_00_model_states.pt, ...   DeepSpeed's files
        universal/                the same independent of the layout, where it was asked for, see `universal.py`

What tools make from other forms has no files of DeepSpeed, only the universal form; its `world_size` is 0.

A folder without a manifest, or with a file that is missing or of another size, is not a checkpoint and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megasparse.utils.files import write_at_once, write_json

FORMAT = 1
MANIFEST = "manifest.json"
TOPOLOGY = "topology.safetensors"
RANDOM = "random.safetensors"
PREFIX = "step-"
CHECKPOINTS = "checkpoints"
"""Folder of them in a run folder."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the folder and what is wrong."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, readable without loading it."""

    step: int
    world_size: int
    """0: there is only the universal form."""
    zero_stage: int
    model: dict[str, Any]
    """Section `model` of the configuration."""
    format: int = FORMAT
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes by file name."""
    topology_sha256: str = ""
    tensor_parallel_size: int = 1

    @property
    def is_universal_only(self) -> bool:
        return self.world_size == 0


class CheckpointStore:
    """The checkpoints below one folder. Only rank 0 calls the methods that write or delete."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def begin(self, step: int) -> str:
        """Name of an empty temporary folder to write into; left-overs of interrupted saves are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"partial-{PREFIX}*"):
            shutil.rmtree(leftover)
        (self.folder / self.partial_name(step)).mkdir()
        return self.partial_name(step)

    def commit(self, manifest: Manifest) -> Path:
        """Turn the temporary folder of `manifest.step` into a checkpoint and drop the oldest ones beyond `keep`."""
        partial = self.folder / self.partial_name(manifest.step)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.is_file()}
        complete = {**asdict(manifest), "files": files, "topology_sha256": sha256(partial / TOPOLOGY)}
        write_json(partial / MANIFEST, complete)
        final = self.folder / self.name(manifest.step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        write_at_once(self.folder / "latest", final.name)
        self._prune(final)
        return final

    def _prune(self, newest: Path) -> None:
        """Delete what is older than the `keep` newest good checkpoints; damaged ones do not count as kept."""
        good = 0
        for folder in self._folders():
            if good >= self.keep and folder != newest:
                shutil.rmtree(folder)
            good += _is_good(folder)

    def newest_good(self) -> tuple[Path, Manifest] | None:
        """The newest checkpoint that is whole, or None."""
        for folder in self._folders():
            try:
                return folder, read_manifest(folder)
            except CheckpointError:
                continue
        return None

    def damaged(self) -> list[str]:
        """Why each folder newer than the newest good one is no checkpoint."""
        reasons = []
        for folder in self._folders():
            try:
                read_manifest(folder)
                break
            except CheckpointError as error:
                reasons.append(str(error))
        return reasons

    @staticmethod
    def name(step: int) -> str:
        return f"{PREFIX}{step:08d}"

    @classmethod
    def partial_name(cls, step: int) -> str:
        return f"partial-{cls.name(step)}"

    def _folders(self) -> Iterator[Path]:
        """Newest first."""
        return iter(sorted(self.folder.glob(f"{PREFIX}*"), reverse=True))


def _is_good(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except CheckpointError:
        return False
    return True


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. Raises CheckpointError naming what is missing, cut off or altered."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**values)
    except OSError:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is missing, so it was never finished") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is not readable: {error}") from None
    if not isinstance(manifest.files, dict) or not isinstance(manifest.model, dict):
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST} is not readable: files and model must be objects")
    if manifest.format != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format {manifest.format}; must be {FORMAT}")
    for name, size in manifest.files.items():
        if problem := size_problem(folder / name, size):
            raise CheckpointError(f"checkpoint {folder}: {name} {problem}")
    if sha256(folder / TOPOLOGY) != manifest.topology_sha256:
        raise CheckpointError(f"checkpoint {folder}: {TOPOLOGY} does not have the checksum of the manifest")
    return manifest


def size_problem(path: Path, size: int) -> str:
    """How a file differs from one of this size; empty where it does not."""
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    return "" if found == size else f"has {found} bytes instead of {size}"


def check_model(folder: Path, saved: dict[str, Any], model: dict[str, Any]) -> None:
    """Raise CheckpointError unless the saved section `model` is this one, naming every field that differs."""
    differences = [
        f"model.{name} is {saved.get(name)!r} there and {value!r} here"
        for name, value in model.items()
        if saved.get(name) != value
    ]
    if differences:
        raise CheckpointError(f"checkpoint {folder} does not fit: {'; '.join(differences)}")


def layout_differences(manifest: Manifest, world_size: int, tensor_parallel_size: int, zero_stage: int) -> list[str]:
    """In what the layout of a checkpoint differs from this one; empty where they are the same."""
    if manifest.is_universal_only:
        return ["it holds only its universal form"]
    differences = []
    if manifest.world_size != world_size:
        ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
        differences.append(f"it was saved by {ranks}, this run has {world_size}")
    settings = {
        "parallel.tensor_parallel_size": (manifest.tensor_parallel_size, tensor_parallel_size),
        "deepspeed.zero_stage": (manifest.zero_stage, zero_stage),
    }
    return differences + [f"{name} is {a} there and {b} here" for name, (a, b) in settings.items() if a != b]


def sha256(path: Path) -> str:
    """Checksum of a file, read piece by piece; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
