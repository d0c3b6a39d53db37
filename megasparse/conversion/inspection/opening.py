"""Finds out what a folder is and opens it as a saved state, without running anything from it.

opened = open_any(Path("runs/x"))
opened.kind, opened.saved.shapes, opened.config
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.checkpoint.compact.manifest import MANIFEST
from megasparse.checkpoint.compact.reader import CompactReader
from megasparse.checkpoint.model_folder import CHECKSUMS, is_model_folder
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.saved_state import SavedState
from megasparse.checkpoint.store import CHECKPOINTS, INDEX, OLD_MANIFEST, CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles, read_json
from megasparse.checkpoint.weights import find_checkpoint, passed_over
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.folder_state import PlainTensors, WeightsState
from megasparse.conversion.sources import PICKLED, FolderSource, open_weights

RUN, CHECKPOINT, COMPACT_FOLDER = "run", "checkpoint", "compact folder"
MODEL_FOLDER, HUGGING_FACE = "model folder", "Hugging Face folder"


@dataclass(frozen=True)
class Opened:
    """A folder that is open for reading."""

    kind: str
    folder: Path
    """Of the tensors: of a run that of its checkpoint."""
    saved: SavedState
    config: RunConfig | None
    """None where none is at hand."""
    layout: dict[str, Any] = field(default_factory=dict)
    """How it was divided over ranks."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size and SHA-256, as far as the folder itself says it, by file."""
    notes: list[str] = field(default_factory=list)


def kind_of(path: Path) -> str:
    """What a folder is, by the files that it has. Raises CheckpointError where it is nothing of ours."""
    if (path / CHECKPOINTS).is_dir():
        return RUN
    if (path / MANIFEST).is_file() and (path / "tensors").is_dir():
        return COMPACT_FOLDER
    if (path / INDEX).is_file() or (path / OLD_MANIFEST).is_file():
        return CHECKPOINT
    if is_model_folder(path):
        return MODEL_FOLDER
    if (path / "config.json").is_file():
        return HUGGING_FACE
    raise CheckpointError(
        f"{path}: {'no such folder' if not path.is_dir() else 'nothing that is known'}; must be a run folder, a "
        "checkpoint in it, a compact folder, a model folder, a Hugging Face folder"
    )


def open_any(path: Path, step: int | None = None) -> Opened:
    """Open a folder of any kind; step: which checkpoint of a run (None: the newest good one).

    Raises ValueError where it is damaged or none of the kinds.
    """
    kind = kind_of(path)
    if step is not None and kind != RUN:
        raise ConfigError(f"--step: {step}; must be unset: {path} is no run but a {kind}")
    if kind == RUN:
        found, _ = find_checkpoint(path, step)
        opened = _open_checkpoint(found, kind)
        damaged = passed_over(path) if step is None else []
        return Opened(**{**vars(opened), "notes": [f"passed over: {reason}" for reason in damaged]})
    if kind == CHECKPOINT:
        return _open_checkpoint(path, kind)
    if kind == COMPACT_FOLDER:
        compact = CompactReader(path)
        return Opened(kind, path, compact, compact.config, files=compact.manifest.files)
    if kind == MODEL_FOLDER:
        source = FolderSource(path)
        listed = read_json(path / CHECKSUMS).get("files", {}) if (path / CHECKSUMS).is_file() else {}
        return Opened(kind, path, WeightsState(source), source.config, files=listed)
    return _open_hugging_face(path)


def config_near(checkpoint: Path) -> RunConfig | None:
    """The configuration of the run that a checkpoint folder lies in, where it does."""
    path = checkpoint.parent.parent / "config.yaml"
    return load_config([path]) if path.is_file() else None


def _open_checkpoint(folder: Path, kind: str) -> Opened:
    saved = Checkpoint(folder)
    files = {name: (file.part.bytes, "") for name, file in saved.files()}
    return Opened(kind, folder, saved, config_near(folder), dict(saved.index.layout), files)


def _open_hugging_face(path: Path) -> Opened:
    weights = open_weights(path)
    paths = weights.paths if isinstance(weights, TensorFiles) else [path / PICKLED]
    files = {file.name: (file.stat().st_size, "") for file in paths}
    return Opened(HUGGING_FACE, path, PlainTensors(weights), None, files=files)
