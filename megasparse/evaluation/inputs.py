"""What is evaluated, read from disk, and refused with file and line where it is not what it should be.

text = read_text(Path("test.txt"))
dataset = open_tokens("data/valid")              # an indexed pair of .bin and .idx
for where, record in read_jsonl(Path("lambada.jsonl")): ...
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.data import DataFacts, IndexedDataset, Tokenizer
from megasparse.data.index_format import DatasetError, dataset_paths
from megasparse.data.packed_files import READ_ERRORS, unpacked
from megasparse.data.text_files import BYTE_ORDER_MARK, decode


def is_token_file(path: str) -> bool:
    """Whether the name is the prefix of an indexed data set, and not a file of its own."""
    return not Path(path).is_file() and all(part.is_file() for part in dataset_paths(path))


def open_tokens(
    prefix: str, vocab_size: int, tokenizer: Tokenizer | None = None, *, option: str = "--input"
) -> IndexedDataset:
    """An indexed data set of at least two tokens, all of them entries of the vocabulary. option: for messages.

    tokenizer: of the model; warns of data that say of themselves that they were made with another one, or that other
    tokens end their documents.
    """
    dataset = IndexedDataset(prefix)
    if dataset.num_tokens < 2:
        raise ConfigError(f"{option}: {prefix} holds {dataset.num_tokens} tokens; must be 2 tokens or more")
    largest = max(
        int(dataset.tokens(start, min(start + 2**20, dataset.num_tokens)).max())
        for start in range(0, dataset.num_tokens, 2**20)
    )
    if largest >= vocab_size:
        raise ConfigError(
            f"{option}: {prefix} holds the token {largest}, the model has {vocab_size} entries; must be a data "
            "set made with the tokenizer of the run"
        )
    if dataset.facts is not None and tokenizer is not None:
        _warn_of_others(prefix, dataset.facts, DataFacts.of(tokenizer), option)
    return dataset


def _warn_of_others(prefix: str, found: DataFacts, own: DataFacts, option: str) -> None:
    """The files of one tokenizer in two formats differ, so sizes are compared."""
    if found.vocab_size != own.vocab_size:
        told = f"made with {found.tokenizer}, of {found.vocab_size} entries, the model's {own.tokenizer} has"
        warnings.warn(f"{option}: {prefix} was {told} {own.vocab_size}; must be the same tokens", stacklevel=3)
    elif found.end_of_document != own.end_of_document:
        told = f"ends documents with {found.end_of_document}, the model with {own.end_of_document}"
        warnings.warn(f"{option}: {prefix} {told}, which it may never have seen there", stacklevel=3)


def read_text(path: str, *, option: str = "--input") -> str:
    """A UTF-8 file, compressed or not, see ``packed_files``; never empty. Line ends are kept, a byte-order mark at its
    beginning is not. option: for messages."""
    try:
        with open(path, "rb") as raw, unpacked(raw, Path(path)) as file:
            text = decode(file.read(), Path(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{option}: {path}: no such file; must be a text file, or the prefix of a .bin and .idx file"
        ) from None
    except READ_ERRORS as error:
        raise ConfigError(f"{option}: {path}: cannot be read ({error})") from None
    except DatasetError as error:
        raise ConfigError(f"{option}: {error}") from None
    if not text.strip():
        raise ConfigError(f"{option}: {path}: no text in it; must be a file with text")
    return text


def read_jsonl(path: str, limit: int | None = None, *, option: str = "--input") -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file, line N`, object) of each line that is not empty, the first `limit` of them; at least one. option: for
    messages."""
    found = 0
    for number, line in enumerate(read_text(path, option=option).split("\n"), 1):
        # Joined files bring their byte-order marks with them.
        line = line.removeprefix(BYTE_ORDER_MARK)
        if limit is not None and found >= limit:
            return
        if not line.strip():
            continue
        where = f"{option}: {path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON ({error}); must be one object a line") from None
        if not isinstance(record, dict):
            raise ConfigError(f"{where}: {type(record).__name__}; must be one JSON object a line")
        found += 1
        yield where, record


def text_field(record: dict[str, Any], key: str, where: str, *, may_be_empty: bool = False) -> str:
    """A string of a record."""
    value = record.get(key)
    if not isinstance(value, str) or not (value.strip() or may_be_empty):
        found = "missing" if key not in record else repr(value)
        raise ConfigError(f"{where}: {key}: {found}; must be {'a text' if may_be_empty else 'a text, not empty'}")
    return check_unicode(value, f"{where}: {key}")


def check_unicode(text: str, where: str) -> str:
    """The text; JSON can hold half a character, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: not valid Unicode ({error.reason}); must be a text") from None
    return text
