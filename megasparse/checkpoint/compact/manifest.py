"""What a compact folder says about itself: ``manifest.json``, read and checked before anything else is.

manifest = read_manifest(folder)
report = size_report(manifest)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.compact.encoding import FORMS, stored_bytes
from megasparse.checkpoint.saved_state import KINDS, SparseParameter
from megasparse.checkpoint.store import CheckpointError
from megasparse.utils.files import write_json

NAME, VERSION, MANIFEST = "megasparse-compact", 2, "manifest.json"
CONFIG, COMPANIONS = "config.yaml", "companions"
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int16)
}


@dataclass(frozen=True)
class Stored:
    """How one parameter lies in its file."""

    shape: list[int]
    kinds: dict[str, dict[str, Any]]
    """By kind: `dtype`, and `fill`, the bit pattern, as a signed integer, of all entries of inactive units; null:
    whole."""
    layer: str | None = None
    """Sparse layer whose weight it is; None: it is dense."""
    block_size: int = 1
    index: str = ""
    """Form of the mask: `bits` or `list`."""
    active: int = 0
    """Active units."""

    @property
    def sparse(self) -> SparseParameter | None:
        return (
            None if self.layer is None else SparseParameter(self.layer, self.block_size, (self.shape[0], self.shape[1]))
        )

    def dtype(self, kind: str) -> torch.dtype:
        return DTYPES[self.kinds[kind]["dtype"]]

    def fill(self, kind: str) -> int | None:
        """None: all entries are stored."""
        return self.kinds[kind]["fill"]

    @property
    def density(self) -> float:
        return 1.0 if self.sparse is None else self.active / self.sparse.num_units


@dataclass(frozen=True)
class CompactManifest:
    step: int
    optimizer_step: int
    weights_only: bool
    """Whether there are weights and masks alone: nothing of the optimizer, the data or the schedule."""
    model: dict[str, Any]
    train_state: dict[str, Any]
    """Of weights alone: what is known of how they came to be."""
    window_losses: list[float]
    loss_scaler: dict[str, float]
    parameters: dict[str, Stored]
    """In the order of the model."""
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and SHA-256 by path."""
    format: str = NAME
    version: int = VERSION
    checksum: str = ""
    """SHA-256 of the rest of the manifest."""


@dataclass(frozen=True)
class ParameterSize:
    """Bytes of one parameter, all kinds together."""

    name: str
    density: float
    dense: int
    expected: int
    """Density x dense, and the masks."""
    compact: int
    """Of its file."""

    @property
    def factor(self) -> float:
        return self.dense / self.compact


def write_manifest(manifest: CompactManifest, folder: Path) -> None:
    values = asdict(manifest)
    write_json(folder / MANIFEST, {**values, "checksum": checksum_of(values)})


def read_manifest(folder: Path) -> CompactManifest:
    """Raises CheckpointError where it is missing, altered, of another format or version, or makes no sense."""
    values = _read_values(folder)
    try:
        parameters = {name: Stored(**fields) for name, fields in values.pop("parameters").items()}
        manifest = CompactManifest(parameters=parameters, **values)
        for name, stored in parameters.items():
            _check_parameter(name, stored)
        for name, (size, checksum) in manifest.files.items():
            assert isinstance(name, str) and isinstance(size, int) and isinstance(checksum, str), name
            assert not Path(name).is_absolute() and ".." not in Path(name).parts, name
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise CheckpointError(f"compact folder {folder}: {MANIFEST} makes no sense: {error}") from None
    return manifest


def tensor_file(name: str) -> str:
    return f"tensors/{name}.safetensors"


def size_report(manifest: CompactManifest) -> list[ParameterSize]:
    """Dense, expected and compact size of every parameter, in the order of the model."""
    rows = []
    for name, stored in manifest.parameters.items():
        sizes = {kind: stored.dtype(kind).itemsize * prod(stored.shape) for kind in stored.kinds}
        dense = expected = sum(sizes.values())
        if stored.sparse is not None:
            index = stored_bytes(stored.index, stored.sparse.num_units, stored.active)
            ever = 0 if manifest.weights_only else stored_bytes("bits", stored.sparse.num_units, 0)
            active = sum(size * (1.0 if stored.fill(k) is None else stored.density) for k, size in sizes.items())
            expected = round(active) + index + ever
        rows.append(ParameterSize(name, stored.density, dense, expected, manifest.files[tensor_file(name)][0]))
    return rows


def _read_values(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"compact folder {folder}: {MANIFEST} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"compact folder {folder}: {MANIFEST} is not readable: {error}") from None
    if not isinstance(values, dict) or values.get("format") != NAME:
        raise CheckpointError(f"{folder}: its {MANIFEST} is not of a compact folder")
    if values.get("version") != VERSION:
        raise CheckpointError(f"compact folder {folder}: version {values.get('version')}; must be {VERSION}")
    if values.get("checksum") != checksum_of(values):
        raise CheckpointError(f"compact folder {folder}: {MANIFEST} does not have its own checksum")
    return values


def _check_parameter(name: str, stored: Stored) -> None:
    # Names become names of files here and of folders elsewhere.
    assert name and Path(name).name == name, f"{name!r} is no name of a parameter"
    for kind, fields in stored.kinds.items():
        assert kind in KINDS and fields["dtype"] in DTYPES, f"{name}: {kind} of {fields}"
        assert fields["fill"] is None or isinstance(fields["fill"], int), f"{name}: {kind} of {fields}"
    assert all(isinstance(n, int) and n >= 0 for n in stored.shape), f"{name}: shape {stored.shape}"
    sparse = stored.sparse
    if sparse is not None:
        assert stored.index in FORMS, f"{name}: a mask of form {stored.index!r}; must be one of {', '.join(FORMS)}"
        assert len(stored.shape) == 2 and stored.block_size >= 1, f"{name}: {stored.shape} of units {stored.block_size}"
        assert not any(n % stored.block_size for n in stored.shape), (
            f"{name}: {stored.shape} of units {stored.block_size}"
        )
        assert 0 <= stored.active <= sparse.num_units, f"{name}: {stored.active} active units"


def checksum_of(values: dict[str, Any]) -> str:
    """SHA-256 of a manifest as plain values, but for its own checksum."""
    rest = {key: value for key, value in values.items() if key != "checksum"}
    # Through JSON and back: tuples become lists.
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
