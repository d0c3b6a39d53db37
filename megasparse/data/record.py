"""What a run records of its data, as `data.json` in its folder: fingerprints, and the token that ends documents.

record = make_record(config, tokenizer)
changed = changes_since(folder, record, allowed=False)      # against what was recorded at the last start
end = recorded_end(folder)                                  # for all that opens the run later, without its data
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data.build import end_of_document
from megasparse.data.facts import EndOfDocument
from megasparse.data.fingerprints import changes, run_fingerprint
from megasparse.data.index_format import DatasetError
from megasparse.data.tokenizer import Tokenizer

RECORD = "data.json"


def make_record(config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """JSON values. tokenizer: as ``open_tokenizer`` gives it."""
    end = end_of_document(config) if tokenizer is None else EndOfDocument.of(tokenizer)
    return {"end_of_document": None if end is None else asdict(end), **run_fingerprint(config)}


def changes_since(folder: Path, record: dict[str, Any], *, allowed: bool) -> list[str]:
    """What differs from the record in a run folder, a line each.

    Raises ConfigError where something does and is not allowed, DatasetError where the record is not readable. Tokens,
    documents in another order, or another tokenizer are no continuation of a run.
    """
    before = _read(folder)
    if before is None:
        return [f"data: cannot be told, as {folder / RECORD} is missing"]
    changed = changes(before, record)
    if changed and not allowed:
        raise ConfigError(
            f"data: not as {folder / RECORD} says: {'; '.join(changed)}; must be the data and the tokenizer that the "
            "run was started with, or data.allow_changed=true"
        )
    return changed


def record_files(folder: Path) -> dict[str, Path]:
    """The record of a run folder by its name, to go along where the run does."""
    return {RECORD: folder / RECORD} if (folder / RECORD).is_file() else {}


def recorded_end(folder: Path) -> EndOfDocument | None:
    """The token that ends the documents of a run; None where it records none, as runs of earlier states do."""
    return EndOfDocument.recorded_in(_read(folder) or {}, folder / RECORD)


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise DatasetError(f"{path}: must be an object of JSON, found a {type(values).__name__}")
    return values
