"""Finds out what a folder is and opens it as a saved state, without running anything from it.

opened = open_any(Path("runs/x"))
opened.kind, opened.saved.shapes, opened.config
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megasparse.checkpoint.compact.manifest import NAME as COMPACT
from megasparse.checkpoint.compact.reader import CompactReader
from megasparse.checkpoint.model_folder import CHECKSUMS, is_model_folder
from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saved_state import SavedState
from megasparse.checkpoint.store import CHECKPOINTS, MANIFEST, CheckpointError, CheckpointStore, read_manifest
from megasparse.checkpoint.tensor_files import TensorFiles, read_json
from megasparse.checkpoint.universal import UNIVERSAL, UniversalReader, open_checkpoint
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.folder_state import PlainTensors, WeightsState
from megasparse.conversion.sources import PICKLED, FolderSource, open_weights

RUN, CHECKPOINT, UNIVERSAL_FORM, COMPACT_FOLDER = "run", "checkpoint", "universal form", "compact folder"
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
    if (path / MANIFEST).is_file():
        if path.name == UNIVERSAL or (path / "zero").is_dir():
            return UNIVERSAL_FORM
        return COMPACT_FOLDER if (path / "tensors").is_dir() or _format(path) == COMPACT else CHECKPOINT
    if is_model_folder(path):
        return MODEL_FOLDER
    if (path / "config.json").is_file():
        return HUGGING_FACE
    raise CheckpointError(
        f"{path}: {'no such folder' if not path.is_dir() else 'nothing that is known'}; must be a run folder, a "
        "checkpoint in it, a universal form, a compact folder, a model folder, a Hugging Face folder"
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
        damaged = CheckpointStore(path / CHECKPOINTS, keep=1).damaged() if step is None else []
        return Opened(**{**vars(opened), "notes": [f"passed over: {reason}" for reason in damaged]})
    if kind == CHECKPOINT:
        return _open_checkpoint(path, kind)
    if kind == UNIVERSAL_FORM:
        universal = UniversalReader(path.parent)
        config = config_near(path.parent)
        return Opened(kind, path, universal, config, files=universal.manifest.files)
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
    manifest, saved = read_manifest(folder), open_checkpoint(folder)
    layout: dict[str, Any] = {"form": "universal form only"}
    if isinstance(saved, CheckpointReader):
        layout = {
            "ranks": manifest.world_size,
            "data_parallel_size": saved.layout.data_parallel_size,
            "tensor_parallel_size": manifest.tensor_parallel_size,
            "zero_stage": manifest.zero_stage,
            "universal_form": (folder / UNIVERSAL).is_dir(),
        }
    files = {name: (size, "") for name, size in manifest.files.items()}
    files["topology.safetensors"] = (files["topology.safetensors"][0], manifest.topology_sha256)
    if isinstance(saved, UniversalReader):
        files |= {f"{UNIVERSAL}/{name}": (size, digest) for name, (size, digest) in saved.manifest.files.items()}
    return Opened(kind, folder, saved, config_near(folder), layout, files)


def _open_hugging_face(path: Path) -> Opened:
    weights = open_weights(path)
    paths = weights.paths if isinstance(weights, TensorFiles) else [path / PICKLED]
    files = {file.name: (file.stat().st_size, "") for file in paths}
    return Opened(HUGGING_FACE, path, PlainTensors(weights), None, files=files)


def _format(path: Path) -> str | None:
    try:
        values = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values.get("format") if isinstance(values, dict) else None
