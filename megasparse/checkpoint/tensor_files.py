"""Safetensors files of a folder, read and written tensor by tensor: memory holds one tensor, not a file.

    files = TensorFiles(folder)                         # model.safetensors, or the shards that an index lists
    weight = files.tensor(files.names[0])

    writer = TensorFileWriter(folder, {"weight": TensorSpec((3, 4), torch.float32)}, {"format": "pt"})
    writer.write("weight", weight)                      # in the order of the specifications
    writer.close()

Names and layout are those of Hugging Face: ``model.safetensors``, or ``model-00001-of-00002.safetensors`` and so on
with ``model.safetensors.index.json``. Shapes are known before the first tensor is made, so the header of a file, which
comes first, is written first: https://huggingface.co/docs/safetensors describes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.utils.files import failures_named, sync_and_close, write_json

STEM = "model"
MAX_FILE_BYTES = 5 * 10**9
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE_BYTES = 64 * 2**20
"""Written at once."""


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFiles:
    """The tensors of a folder. Raises CheckpointError for a file that is missing, cut off or of another kind.

    Attributes:
        specs: shape and dtype by name, file by file, in the order in which they lie there.
        metadata: that of the first file.
    """

    def __init__(self, folder: Path, stem: str = STEM) -> None:
        self.folder = folder
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            self.paths = [single]
        elif index.is_file():
            self.paths = _listed(index)
        else:
            raise CheckpointError(f"{folder}: there is neither {single.name} nor {index.name}")
        for number, path in enumerate(self.paths):
            metadata = self._read_header(path)
            if number == 0:
                self.metadata = metadata
        if not single.is_file():
            self._check_against(index)

    @property
    def names(self) -> list[str]:
        return list(self.specs)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._spec(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor mapped from its file; the mapping goes with the last tensor that uses it."""
        self._spec(name)
        # A new mapping every time: one that is kept would hold all pages that were ever read.
        with _opened(self._paths[name]) as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, mapped from its file."""
        return self.tensor(name)[start:stop]

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r}")
        return self.specs[name]

    def _read_header(self, path: Path) -> dict[str, str]:
        if not path.is_file():
            raise CheckpointError(f"{self.folder}: {path.name} is missing")
        with _opened(path) as file:
            for name in file.offset_keys():
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise CheckpointError(
                        f"{path}: {name} has dtype {part.get_dtype()}; must be one of {', '.join(DTYPES)}"
                    )
                if name in self.specs:
                    raise CheckpointError(f"{path}: {name} is in {self._paths[name].name} too")
                self.specs[name] = TensorSpec(tuple(part.get_shape()), DTYPES[part.get_dtype()])
                self._paths[name] = path
            return file.metadata() or {}

    def _check_against(self, index: Path) -> None:
        listed = read_json(index)["weight_map"]
        odd = sorted(set(listed) ^ set(self.specs))
        if odd:
            raise CheckpointError(f"{index}: index and files differ at {', '.join(odd[:4])}")


class _opened:
    """``safe_open`` with errors that name the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Any:
        try:
            self._file = safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._path}: not a whole safetensors file: {error}") from None
        return self._file.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"{self._path}: {error}") from None


def _listed(index: Path) -> list[Path]:
    """The files that an index names, each once, in their order."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted(set(weight_map.values()), key=str)
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is no name of a file in the same folder")
    return [index.parent / name for name in names]


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A whole safetensors file. Raises OSError where it cannot be written."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object, found a {type(values).__name__}")
    return values


class TensorFileWriter:
    """Writes tensors one after another into as many files as a limit on their size asks for.

    Args:
        folder: exists; the files must not.
        specs: of all tensors, in the order in which they will be written.
        metadata: goes into each file.
        max_file_bytes: a file holds tensors of so many bytes at most, and at least one tensor.

    Attributes:
        checksums: size in bytes and SHA-256 of each file that is finished.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        max_file_bytes: int = MAX_FILE_BYTES,
        stem: str = STEM,
    ) -> None:
        self.folder, self.specs, self.metadata, self.stem = folder, dict(specs), dict(metadata), stem
        self.checksums: dict[str, tuple[int, str]] = {}
        self._shards = _divide(self.specs, max_file_bytes)
        self._pending = list(self.specs)[::-1]
        self._number = 0
        self._file: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; it is asserted that it has its turn, shape and dtype."""
        assert self._pending and self._pending.pop() == name, f"{name} is not the next tensor"
        assert TensorSpec(tuple(tensor.shape), tensor.dtype) == self.specs[name], f"{name}: {tensor.shape}"
        if self._file is None:
            self._begin()
        flat = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
        for piece in flat.split(PIECE_BYTES):
            self._put(piece.numpy().data)
        if name == self._shards[self._number][-1]:
            self._finish()

    def close(self) -> None:
        """After the last tensor: writes the index where there are several files."""
        assert not self._pending and self._file is None, f"{len(self._pending)} tensors were not written"
        if not self.specs:
            self._begin()
            self._finish()
        if len(self._shards) > 1:
            weight_map = {name: self._name(i) for i, names in enumerate(self._shards) for name in names}
            total = sum(spec.num_bytes for spec in self.specs.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", content)

    def abandon(self) -> None:
        """Close the open file, if any, unfinished."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # it writes again what could not be written
                self._file.close()
            self._file = None

    def _name(self, number: int) -> str:
        count = len(self._shards)
        return f"{self.stem}.safetensors" if count == 1 else f"{self.stem}-{number + 1:05}-of-{count:05}.safetensors"

    def _begin(self) -> None:
        self._file = (self.folder / self._name(self._number)).open("xb")
        self._sha256, self._size = hashlib.sha256(), 0
        header: dict[str, Any] = {"__metadata__": self.metadata}
        offset = 0
        for name in self._shards[self._number]:
            spec = self.specs[name]
            end = offset + spec.num_bytes
            header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        # The data begin at a multiple of eight bytes.
        encoded += b" " * (-len(encoded) % 8)
        self._put(len(encoded).to_bytes(8, "little") + encoded)

    def _put(self, content: bytes | memoryview) -> None:
        assert self._file is not None
        with failures_named(self.folder / self._name(self._number)):
            self._file.write(content)
        self._sha256.update(content)
        self._size += len(content)

    def _finish(self) -> None:
        assert self._file is not None
        with failures_named(self.folder / self._name(self._number)):
            sync_and_close(self._file)
        self.checksums[self._name(self._number)] = (self._size, self._sha256.hexdigest())
        self._file, self._number = None, self._number + 1


def _divide(specs: Mapping[str, TensorSpec], max_file_bytes: int) -> list[list[str]]:
    """Names by file: files are filled in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.num_bytes > max_file_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.num_bytes
    return shards
