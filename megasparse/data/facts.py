"""What a data set says about how it was made: `<prefix>.meta.json`, beside the `.bin` and `.idx` of `index_format`.

    facts = read_facts("data/web")             # None for data of other programs, whose format has no room for them
    facts.end_of_document                      # EndOfDocument(id=0, piece="<|endoftext|>")

The token that ends documents is a choice, and a tokenizer may have several: it is made once, in preprocessing, and all
that sample, evaluate or export later use the one recorded here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from megasparse.data.index_format import DatasetError, dataset_paths
from megasparse.data.vocabulary import Tokenizer
from megasparse.utils.differences import shown
from megasparse.utils.files import write_json

FORMAT = "megasparse token data 1"


@dataclass(frozen=True)
class EndOfDocument:
    """The id of the token that ends documents and, where the tokenizer has names, its name."""

    id: int
    piece: str | None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> EndOfDocument:
        return cls(tokenizer.end_of_document_id, tokenizer.end_of_document)

    @classmethod
    def recorded_in(cls, values: Mapping[str, Any], where: object) -> EndOfDocument | None:
        """Under the key `end_of_document`, as ``asdict`` gives it; None where nothing is recorded.

        DatasetError, with `where`, for what is no such record.
        """
        found = values.get("end_of_document")
        if found is None:
            return None
        id, piece = (found.get(name) for name in ("id", "piece")) if isinstance(found, dict) else (None, None)
        if not isinstance(id, int) or isinstance(id, bool) or not isinstance(piece, str | None):
            raise DatasetError(f"{where}: end_of_document: {found!r}; must be an id and the name of a token or null")
        return cls(id, piece)

    def __str__(self) -> str:
        return f"id {self.id}" if self.piece is None else f"id {self.id} ({self.piece})"


@dataclass(frozen=True)
class DataFacts:
    """The tokenizer of a data set: its name, the SHA-256 of its file (None without one), its size, its end token."""

    tokenizer: str
    tokenizer_sha256: str | None
    vocab_size: int
    end_of_document: EndOfDocument

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> DataFacts:
        return cls(tokenizer.name, tokenizer.file_sha256, tokenizer.vocab_size, EndOfDocument.of(tokenizer))

    @property
    def identity(self) -> str | None:
        """What tells the tokenizer from others: the hash of its file, or `bytes`; None where that is not recorded."""
        return self.tokenizer_sha256 or (self.tokenizer if self.tokenizer == "bytes" else None)

    @property
    def described(self) -> str:
        """The tokenizer, for messages."""
        digest = self.tokenizer_sha256
        return self.tokenizer if digest is None else f"{self.tokenizer} (SHA-256 {shown(digest)})"


def facts_path(prefix: str | PathLike[str]) -> Path:
    return Path(fspath(prefix) + ".meta.json")


def check_output_prefix(prefix: str) -> None:
    """Raises ValueError for a prefix that data cannot be written under, before hours of work end in that."""
    folder, name = os.path.split(prefix)
    if name in ("", ".", "..") or os.path.isdir(prefix):
        raise ValueError(
            f"--output-prefix: {prefix} is a folder; must be a folder and the beginning of a name, such as "
            f"{os.path.join(prefix, 'tokens')}"
        )
    for path in (*dataset_paths(prefix), facts_path(prefix)):
        if path.exists() and not path.is_file():
            raise ValueError(f"--output-prefix: {path} is there and no file; must be a prefix of new files")
        # A file that is mounted by itself, as containers do it, cannot be replaced.
        if path.exists() and os.path.ismount(path):
            raise ValueError(f"--output-prefix: {path} is a mount point; must be a prefix of files in a mounted folder")
    parent = Path(folder or ".").absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise ValueError(f"--output-prefix: {prefix}: {parent} is no folder that can be written; must be one")


def write_facts(prefix: str | PathLike[str], facts: DataFacts, *, documents: int, tokens: int) -> None:
    sizes = {"documents": documents, "tokens": tokens}
    write_json(facts_path(prefix), {"format": FORMAT, **sizes, **asdict(facts)})


def read_facts(
    prefix: str | PathLike[str], *, documents: int | None = None, tokens: int | None = None
) -> DataFacts | None:
    """The facts beside a data set, None where there are none. DatasetError for a file that holds something else.

    Where the sizes of the data are given, they must be those that were recorded.
    """
    path = facts_path(prefix)
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = values.pop("format")
        recorded = {"documents": values.pop("documents"), "tokens": values.pop("tokens")}
        facts = DataFacts(**values | {"end_of_document": EndOfDocument(**values["end_of_document"])})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: not readable as the facts of a data set ({error})") from error
    if found != FORMAT:
        raise DatasetError(f"{path}: format {found!r}; must be {FORMAT!r}")
    for name, size in (("documents", documents), ("tokens", tokens)):
        if size is not None and size != recorded[name]:
            raise DatasetError(f"{path}: {recorded[name]} {name}, the data has {size}; must be of the same data")
    return facts


def recorded_end_of_document(prefixes: Iterable[str]) -> EndOfDocument | None:
    """The token that ends the documents of all these data sets; None where none of them tells.

    DatasetError naming two that end documents with different tokens.
    """
    first: tuple[str, EndOfDocument] | None = None
    for prefix in prefixes:
        facts = read_facts(prefix)
        if facts is None:
            continue
        if first is None:
            first = (prefix, facts.end_of_document)
        elif facts.end_of_document != first[1]:
            raise DatasetError(
                f"{first[0]} ends documents with {first[1]}, {prefix} with {facts.end_of_document}; must be one token "
                "in all data of a run (--end-of-document of tools/preprocess_data.py)"
            )
    return None if first is None else first[1]


def recorded_tokenizer(prefixes: Iterable[str]) -> tuple[str, DataFacts] | None:
    """The first of these data sets that tells which tokenizer made it, and what it says; None where none of them does.

    DatasetError naming two that were made with different ones.
    """
    first: tuple[str, DataFacts] | None = None
    for prefix in prefixes:
        facts = read_facts(prefix)
        if facts is None or facts.identity is None:
            continue
        if first is None:
            first = (prefix, facts)
        elif facts.identity != first[1].identity:
            raise DatasetError(
                f"{first[0]} was made with {first[1].described}, {prefix} with {facts.described}; must be one "
                "tokenizer in all data of a run"
            )
    return first
