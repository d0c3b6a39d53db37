"""The file of one rank in a checkpoint: safetensors, with a checksum for every few kilobytes.

    part = write_rank_file(folder / "rank-00000.safetensors", {"fp32/head.weight": spec, ...}, tensors)
    file = RankFile(folder / "rank-00000.safetensors", part)
    entries = file.read("fp32/head.weight", start, numel)

The last tensor, `checksums`, holds the CRC-32 of every block of `BLOCK_BYTES` of the tensors before it. It and the
header are covered by one checksum more, which stands in the index of the checkpoint. So whatever is read has been
checked, at the cost of at most two blocks beside it, and a file of another checkpoint is told from this one.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import CODES, DTYPES, TensorSpec
from megasparse.utils.files import new_file

BLOCK_BYTES = 8192
CHECKSUMS = "checksums"
PIECE_BLOCKS = 4096
"""Written at once: 32 MiB."""
MAX_HEADER_BYTES = 2**30


@dataclass(frozen=True)
class FilePart:
    """What the index says of a file."""

    bytes: int
    checksum: str
    """CRC-32 of header and checksums, as eight hexadecimal digits."""


def write_rank_file(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> FilePart:
    """Write 1-D or shaped tensors in the order of `specs`; when it returns the content has reached the disk.

    tensors: on the host, each asked for when the one before it is written. Raises OSError where it cannot be written.
    """
    blocks = sum(-(-spec.num_bytes // BLOCK_BYTES) for spec in specs.values())
    header = _header({**specs, CHECKSUMS: TensorSpec((blocks,), torch.int64)})
    checksums: list[int] = []
    with new_file(path) as file:
        file.write(header)
        for name, tensor in tensors:
            assert TensorSpec(tuple(tensor.shape), tensor.dtype) == specs[name], f"{name}: {tensor.shape}"
            _write_tensor(file, tensor, checksums)
            # It would live on while the next one is made.
            del tensor
        assert len(checksums) == blocks, "tensors are missing"
        trailer = np.asarray(checksums, dtype="<i8").tobytes()
        file.write(trailer)
        size = file.tell()
    return FilePart(size, f"{zlib.crc32(trailer, zlib.crc32(header)):08x}")


def _write_tensor(file: IO[bytes], tensor: Tensor, checksums: list[int]) -> None:
    content = memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    for start in range(0, len(content), PIECE_BLOCKS * BLOCK_BYTES):
        piece = content[start : start + PIECE_BLOCKS * BLOCK_BYTES]
        file.write(piece)
        checksums += [zlib.crc32(piece[at : at + BLOCK_BYTES]) for at in range(0, len(piece), BLOCK_BYTES)]


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "megasparse"}}
    offset = 0
    for name, spec in specs.items():
        content[name] = {
            "dtype": CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    encoded = json.dumps(content, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


class RankFile:
    """Reads from the file of a rank. Raises CheckpointError naming the file where it is not what the index says.

    Attributes:
        specs: shape and dtype by name.
        bytes_read: of the data, so far.
    """

    def __init__(self, path: Path, part: FilePart) -> None:
        self.path, self.bytes_read = path, 0
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
        size = os.fstat(self._file).st_size
        if size != part.bytes:
            self._fail(f"has {size} bytes instead of {part.bytes}")
        header = self._header_bytes(size)
        self._begin = len(header)
        try:
            content = json.loads(header[8:])
            content.pop("__metadata__", None)
            trailer = content.pop(CHECKSUMS)["data_offsets"]
            self._places = {name: tuple(entry["data_offsets"]) for name, entry in content.items()}
            self.specs = {n: TensorSpec(tuple(e["shape"]), DTYPES[e["dtype"]]) for n, e in content.items()}
            first_blocks, blocks = {}, 0
            for name, (start, end) in self._places.items():
                first_blocks[name] = blocks
                blocks += -(-(end - start) // BLOCK_BYTES)
            checksums = self._pread(self._begin + trailer[0], trailer[1] - trailer[0])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._fail("its header does not have the checksum of the index")
        if f"{zlib.crc32(checksums, zlib.crc32(header)):08x}" != part.checksum:
            self._fail("its header or checksums do not have the checksum of the index")
        self._first_blocks, self._checksums = first_blocks, np.frombuffer(checksums, dtype="<i8")

    def close(self) -> None:
        os.close(self._file)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Entries [start, start + numel) of a flattened tensor, in memory of their own; None: to its end."""
        spec, (begin, end) = self.specs[name], self._places[name]
        item = spec.dtype.itemsize
        stop = end - begin if numel is None else (start + numel) * item
        assert 0 <= start * item <= stop <= end - begin, f"{name}: {start}, {numel}"
        if start * item == stop:
            return torch.empty(0, dtype=spec.dtype)
        first = start * item // BLOCK_BYTES
        last = -(-stop // BLOCK_BYTES)
        content = self._pread(
            self._begin + begin + first * BLOCK_BYTES, min(last * BLOCK_BYTES, end - begin) - first * BLOCK_BYTES
        )
        self.bytes_read += len(content)
        view = memoryview(content)
        for number in range(last - first):
            found = zlib.crc32(view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
            if found != self._checksums[self._first_blocks[name] + first + number]:
                self._fail(f"{name} does not have its checksum: the file was changed or the disk is bad")
        skipped = start * item - first * BLOCK_BYTES
        return torch.frombuffer(content, dtype=torch.uint8)[skipped : skipped + stop - start * item].view(spec.dtype)

    def _header_bytes(self, size: int) -> bytes:
        count = int.from_bytes(self._pread(0, min(8, size)), "little")
        if count > min(MAX_HEADER_BYTES, size - 8):
            self._fail("its header does not have the checksum of the index")
        return bytes(self._pread(0, 8 + count))

    def _pread(self, offset: int, count: int) -> bytearray:
        content = bytearray(count)
        view, done = memoryview(content), 0
        while done < count:
            try:
                got = os.preadv(self._file, [view[done:]], offset + done)
            except OSError as error:
                self._fail(f"not readable: {error.strerror}")
            if got == 0:
                self._fail("ends too early")
            done += got
        return content

    def _fail(self, reason: str) -> Any:
        raise CheckpointError(f"{self.path}: {reason}") from None
