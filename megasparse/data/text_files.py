"""The bytes of a corpus file as UTF-8 text, piece by piece, in time linear in their number.

    for text in decoded(file, path, by_line=True, read_characters=2**20): ...

A byte-order mark at the beginning is no part of the text. UTF-16 and UTF-32 are named where they are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megasparse.data.index_format import DatasetError
from megasparse.data.packed_files import KNOWN_FORMATS

BYTE_ORDER_MARK = "\ufeff"
# The longer marks come first: that of UTF-16 begins that of UTF-32.
FOREIGN_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}

# What a file may begin with whose name does not say so.
FORMATS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"PAR1": "Parquet",
    b"PK\x03\x04": "zip",
    b"%PDF": "PDF",
}


def decoded(file: IO[bytes], path: Path, *, by_line: bool, read_characters: int) -> Iterator[str]:
    """Lines with their line ends, or, where lines do not matter, large pieces of text."""
    waiting: list[bytes] = []
    position = 0
    while True:
        block = file.read(read_characters)
        waiting.append(block)
        # Joined only at a line end: joining at each block would cost the square of the length of a line.
        if block and by_line and b"\n" not in block:
            continue
        content = b"".join(waiting)
        # A block may end inside a line, or inside a character; the last line end is a safe place to stop at.
        end = content.rfind(b"\n") + 1 if block else len(content)
        if end == 0 and block:
            end = _last_character_end(content)
        text = decode(content[:end], path, position)
        waiting, position = [content[end:]], position + end
        if text:
            yield from split_lines(text) if by_line else (text,)
        if not block:
            return


def decode(content: bytes, path: Path, position: int = 0) -> str:
    """The text of bytes that stand at `position` of a file. DatasetError naming file and encoding, or file and byte."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        for mark, name in FOREIGN_MARKS.items():
            if position == 0 and content.startswith(mark):
                raise DatasetError(f"{path}: {name} text, by its byte-order mark; must be UTF-8") from error
        for mark, name in FORMATS.items():
            if position == 0 and content.startswith(mark):
                raise DatasetError(
                    f"{path}: {name} data, which its name does not say; must be one of {KNOWN_FORMATS}"
                ) from error
        raise DatasetError(
            f"{path}: not UTF-8 text; byte 0x{content[error.start]:02x} at offset {position + error.start}"
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK) if position == 0 else text


def split_lines(text: str) -> list[str]:
    # str.splitlines also splits at form feeds, U+2028 and others, which are ordinary characters of a text.
    lines = text.split("\n")
    last = lines.pop()
    return [line + "\n" for line in lines] + ([last] if last else [])


def _last_character_end(content: bytes) -> int:
    """Where the last complete UTF-8 character of `content` ends; at most 3 bytes are left over."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte < 0x80:
            return len(content) - back + 1
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) if back >= length else len(content) - back
    return len(content)
