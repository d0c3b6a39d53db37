"""Reads documents from text, JSONL and folders, as a stream, so that memory stays flat for any input size.

    reader = CorpusReader(["books.txt.xz", "web.jsonl", "src/"], CorpusOptions(glob="*.py"))
    for segment in reader.segments():
        segment.text, segment.ends_document

What a file holds is told by its name, see ``packed_files``: JSON lines, Parquet or UTF-8 text, compressed or not. In
text files documents end by `document_rule`:

    file        the whole file is one document
    line        each line that is not blank, without its line end
    blank-line  paragraphs between blank lines
    wikitext    an article begins at a line ` = Title = ` (a single `=`) after a blank line
    separator   a line equal to `separator` ends a document and belongs to none

Files found in a folder are always one document each (JSON lines and Parquet excepted), in the order of their paths.
Those that cannot be read or decoded are skipped, counted and warned about; a file named directly, and any Parquet file,
raises `DatasetError` instead.

A document comes in segments, cut where the tokenizer does not notice, see ``segments``. Empty documents are dropped.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import IO, Any

from megasparse.data.index_format import DatasetError
from megasparse.data.packed_files import READ_ERRORS, check_format, is_json_lines, is_parquet, parquet_texts, unpacked
from megasparse.data.segments import CutCheck, Segment, cut_documents
from megasparse.data.text_files import BYTE_ORDER_MARK, decode, decoded, split_lines

DOCUMENT_RULES = ("file", "line", "blank-line", "wikitext", "separator")
READ_CHARACTERS = 2**20
WIKITEXT_TITLE = re.compile(r" = [^=].* = \n?")


@dataclass(frozen=True)
class CorpusOptions:
    """How to find documents; see the module header.

    `glob` selects files below a folder, `exclude` names folders and files in it that are passed over, by pattern;
    `jsonl_key` is the key of the text in JSON lines, and its column in Parquet.
    """

    document_rule: str = "file"
    separator: str | None = None
    jsonl_key: str = "text"
    glob: str = "*.txt"
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.document_rule not in DOCUMENT_RULES:
            raise ValueError(f"document_rule is {self.document_rule!r}; must be {', '.join(DOCUMENT_RULES)}")
        if (self.document_rule == "separator") != (self.separator is not None):
            raise ValueError(
                f"document_rule is {self.document_rule!r} and separator {self.separator!r}; the rule 'separator' "
                "needs a separator line and no other rule takes one"
            )


class CorpusReader:
    """Streams the documents of `paths`, in the order given. DatasetError for inputs that cannot be used.

    `total_bytes` is the size of the input files, `bytes_read` how much of it has been read (compressed files count
    compressed), `skipped_files` how many files of folders were skipped.
    """

    def __init__(self, paths: Sequence[str | PathLike[str]], options: CorpusOptions | None = None):
        self.options = options or CorpusOptions()
        self.skipped_files = 0
        self.bytes_read = 0
        self._files = [item for path in paths for item in self._expand(Path(path))]
        if not self._files:
            raise DatasetError("no input files")
        self.total_bytes = sum(path.stat().st_size for path, _ in self._files)

    def _expand(self, path: Path) -> list[tuple[Path, bool]]:
        """The files of one input path, each with: was it found in a folder?"""
        if path.is_file():
            check_format(path)
            return [(path, False)]
        if not path.is_dir():
            raise DatasetError(f"{path}: no such file or folder")
        matching = (file for file in path.rglob(self.options.glob) if file.is_file())
        found = sorted((file for file in matching if not self._is_excluded(file, path)), key=lambda file: file.parts)
        if not found:
            raise DatasetError(f"{path}: no file below this folder matches {self.options.glob!r}")
        return [(file, True) for file in found]

    def _is_excluded(self, file: Path, folder: Path) -> bool:
        """Whether the name of the file, or of a folder between `folder` and it, matches a pattern of `exclude`."""
        parts = file.relative_to(folder).parts
        return any(fnmatchcase(part, pattern) for part in parts for pattern in self.options.exclude)

    def unused_options(self) -> list[str]:
        """Names of the options of `CorpusOptions` that play no part for these files."""
        named = [path for path, in_folder in self._files if not in_folder]
        unused = []
        if all(is_parquet(path) or is_json_lines(path) for path in named):
            unused += ["document_rule", "separator"]
        if not any(is_parquet(path) or is_json_lines(path) for path, _ in self._files):
            unused.append("jsonl_key")
        if len(named) == len(self._files):
            unused += ["glob", "exclude"]
        return unused

    def documents(self) -> Iterator[str]:
        """Whole documents, for callers that know them to be small."""
        parts = []
        for segment in self.segments():
            parts.append(segment.text)
            if segment.ends_document:
                yield "".join(parts)
                parts = []

    def segments(self, may_cut: CutCheck | None = None) -> Iterator[Segment]:
        """All documents as segments, cut where `may_cut` allows; may be called again, and gives the same ones."""
        return cut_documents(self._texts(), may_cut)

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of JSON lines, each with its file and line. DatasetError for other files."""
        self.bytes_read, done = 0, 0
        for path, _ in self._files:
            if not is_json_lines(path):
                raise DatasetError(f"{path}: examples are read from JSON lines; must be .jsonl, .ndjson or .json")
            try:
                with open(path, "rb") as raw, unpacked(raw, path) as file:
                    yield from _json_objects(self._decoded(file, raw, path, done), path)
            except READ_ERRORS as error:
                raise DatasetError(f"{path}: cannot be read ({error})") from error
            done += path.stat().st_size
            self.bytes_read = done

    def _texts(self) -> Iterator[str | None]:
        """The text of all documents in pieces, with None where one ends."""
        self.bytes_read, self.skipped_files = 0, 0
        done = 0
        for path, in_folder in self._files:
            if is_parquet(path):
                yield from self._parquet(path, done)
            else:
                yield from self._file_in_folder(path) if in_folder else self._named_file(path, done)
            done += path.stat().st_size
            self.bytes_read = done
        if self.skipped_files:
            warnings.warn(
                f"{self.skipped_files} of {len(self._files)} files could not be read as UTF-8 text and were skipped",
                stacklevel=2,
            )

    def _file_in_folder(self, path: Path) -> Iterator[str | None]:
        # Decoded as a whole before anything is yielded, so that a bad file leaves no half document behind.
        try:
            check_format(path)
            with open(path, "rb") as raw, unpacked(raw, path) as file:
                content = decode(file.read(), path)
        except (*READ_ERRORS, DatasetError):
            self.skipped_files += 1
            return
        if is_json_lines(path):
            yield from self._jsonl(split_lines(content), path)
        else:
            yield from (content, None)

    def _named_file(self, path: Path, done: int) -> Iterator[str | None]:
        try:
            with open(path, "rb") as raw, unpacked(raw, path) as file:
                lines = self._decoded(file, raw, path, done)
                yield from self._jsonl(lines, path) if is_json_lines(path) else self._marked(lines)
        except READ_ERRORS as error:
            raise DatasetError(f"{path}: cannot be read ({error})") from error

    def _parquet(self, path: Path, done: int) -> Iterator[str | None]:
        size = path.stat().st_size
        for text, share in parquet_texts(path, self.options.jsonl_key):
            self.bytes_read = done + round(share * size)
            yield from (text, None)

    def _decoded(self, file: IO[bytes], raw: IO[bytes], path: Path, done: int) -> Iterator[str]:
        by_line = self.options.document_rule != "file" or is_json_lines(path)
        for text in decoded(file, path, by_line=by_line, read_characters=READ_CHARACTERS):
            self.bytes_read = done + raw.tell()
            yield text

    def _marked(self, lines: Iterator[str]) -> Iterator[str | None]:
        """The text of documents, with None where one ends."""
        rule, separator = self.options.document_rule, self.options.separator
        after_blank, has_text = True, False
        for line in lines:
            if rule == "line":
                yield from (line.rstrip("\r\n"), None) if line.strip() else ()
            elif rule == "blank-line":
                yield line if line.strip() else None
            elif rule == "separator":
                yield None if line.rstrip("\r\n") == separator else line
            elif rule == "wikitext":
                if after_blank and has_text and WIKITEXT_TITLE.fullmatch(line):
                    yield None
                after_blank = not line.strip()
                has_text = has_text or not after_blank
                yield line
            else:
                yield line
        yield None

    def _jsonl(self, lines, path: Path) -> Iterator[str | None]:
        for where, record in _json_objects(lines, path):
            yield _json_text(record, self.options.jsonl_key, where)
            yield None


def _json_objects(lines: Iterable[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each line that is not blank holds, with its place."""
    for number, line in enumerate(lines, start=1):
        # Joined files bring their byte-order marks with them.
        line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DatasetError(f"{where}: not JSON ({error}); must be one object a line") from error
        # What is no object has no text under any key.
        yield where, record if isinstance(record, dict) else {}


def _json_text(record: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(record.get(key), str):
        raise DatasetError(f"{where}: no text under the key {key!r}; each line is an object with a string there")
    text = record[key]
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DatasetError(f"{where}: the text is not valid Unicode ({error.reason})") from error
    return text
