"""What a corpus file is by its name, and how its bytes and records are read as a stream.

    if is_parquet(path): texts = parquet_texts(path, "text")
    with open(path, "rb") as raw, unpacked(raw, path) as file: ...

Names count in any letter case: `.jsonl`, `.ndjson` and `.json` are one JSON object a line, `.parquet` a table,
everything else text; all but tables may be compressed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import zstandard

from megasparse.data.index_format import DatasetError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst")
JSON_LINES = (".jsonl", ".ndjson", ".json")
KNOWN_FORMATS = f"text and {', '.join(JSON_LINES)}, each also with {', '.join(COMPRESSIONS)}; .parquet"
# Archives, other compressions, other tables and documents: some of them even decode as text.
OTHER_FORMATS = (
    *(
        ".tar",
        ".tgz",
        ".tbz",
        ".tbz2",
        ".txz",
        ".zip",
        ".7z",
        ".rar",
        ".lz4",
        ".lzma",
        ".lz",
        ".lzo",
        ".br",
        ".sz",
        ".z",
    ),
    *(".arrow", ".feather", ".avro", ".orc", ".ipc", ".npy", ".npz", ".h5", ".hdf5", ".tfrecord", ".mds", ".warc"),
    *(".bin", ".idx", ".pdf", ".docx", ".xlsx", ".epub"),
)
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)
ZSTD_BYTES = 2**17


def is_json_lines(path: Path) -> bool:
    return _ending(path) in JSON_LINES


def check_format(path: Path) -> None:
    """Raises DatasetError for a file whose name says that it is nothing that can be read here."""
    ending = _ending(path)
    packed_table = ending == ".parquet" and not is_parquet(path)
    if packed_table or ending in OTHER_FORMATS:
        raise DatasetError(f"{path}: unknown format; must be one of {KNOWN_FORMATS}")


def _ending(path: Path) -> str:
    """The ending of the name before that of a compression, in small letters."""
    name = Path(path.name.lower())
    return (name.with_suffix("") if name.suffix in COMPRESSIONS else name).suffix


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    """The content of an open file; reading raises one of READ_ERRORS where it is damaged or ends early."""
    kind = path.suffix.lower()
    if kind == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if kind == ".bz2":
        return cast(IO[bytes], bz2.open(raw, "rb"))
    if kind == ".zst":
        return cast(IO[bytes], _ZstdReader(raw))
    return lzma.open(raw, "rb") if kind == ".xz" else raw


class _ZstdReader(io.RawIOBase):
    """Reads frame after frame; the library's own stream takes a file that was cut off for one that ends."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._rest = raw, b""
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """At least one byte where there are any, as many as one piece of the file holds; all where size is below 0."""
        pieces: list[bytes] = []
        while size < 0 or not any(pieces):
            data, self._rest = self._rest or self._raw.read(ZSTD_BYTES), b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed file ends early")
                break
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            pieces.append(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        return b"".join(pieces)


def parquet_texts(path: Path, column: str) -> Iterator[tuple[str, float]]:
    """The texts of a column, row group by row group, each with the share of the file that has been read.

    Raises DatasetError naming file and column: no such column, one that holds no strings, a row without a text.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DatasetError(f"{path}: reading Parquet needs the package pyarrow (extra `parquet`)") from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise DatasetError(f"{path}: no column {column!r}; must be one of {', '.join(schema.names)}")
            kind = schema.field(column).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DatasetError(f"{path}: column {column!r} holds {kind}; must be strings")
            rows = max(file.metadata.num_rows, 1)
            done = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0):
                    done += 1
                    if not text.is_valid:
                        raise DatasetError(f"{path}, row {done}: column {column!r} is null; must be a string")
                    yield text.as_py(), done / rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: not readable as Parquet ({error})") from error
