"""Tokens by which a model folder's own files say where its texts begin and end.

    ends = end_tokens(folder, tokenizer, model.vocab_size)        # one or several, as generation_config.json says
    begin = begin_token(folder, tokenizer, model.vocab_size)

A run has no such files: its documents end with the tokenizer's end of a document, which also stands before the next
one, so that a text begins after it.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from megasparse.checkpoint.tensor_files import read_json
from megasparse.config.loader import ConfigError
from megasparse.data.tokenizer import Tokenizer

GENERATION = "generation_config.json"
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def end_tokens(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> tuple[int, ...]:
    """The model's own end tokens; where it names none, the tokenizer's. Raises ConfigError for what is no id.

    vocab_size: entries of the model. Files made for another vocabulary name tokens that it does not have.
    """
    return own_ids(folder / GENERATION, "eos_token_id", vocab_size) or (tokenizer.end_of_document_id,)


def begin_token(folder: Path, tokenizer: Tokenizer, vocab_size: int) -> int:
    """What stands before a text: the begin token of the tokenizer's settings, or their end token where there is none.

    Where these say nothing, that of generation, or else the tokenizer's end of a document.
    """
    settings = [_values(folder / file) for file in TOKENIZER_SETTINGS]
    # Older settings do not mention the begin token: it is that of the model's kind, which generation names too.
    if any("bos_token" in values for values in settings):
        names = _ids_of_names(folder)
        for kind in ("bos_token", "eos_token"):
            found = [names.get(_content(values[kind])) for values in settings if values.get(kind) is not None]
            known = [token for token in found if token is not None and token < vocab_size]
            if known:
                return known[0]
    own = own_ids(folder / GENERATION, "bos_token_id", vocab_size)
    return own[0] if own else tokenizer.end_of_document_id


def leading_tokens(folder: Path, begin: int, vocab_size: int) -> tuple[int, ...]:
    """What transformers' tokenizer of the folder puts before every text, unless it is told not to; `begin` or nothing
    where its settings say so."""
    wanted = _values(folder / "tokenizer_config.json").get("add_bos_token")
    if wanted is not None:
        return (begin,) if wanted else ()
    post_processor = _values(folder / "tokenizer.json").get("post_processor") or {}
    for part in post_processor.get("processors", [post_processor]):
        if part.get("type") != "TemplateProcessing":
            continue
        pieces = itertools.takewhile(lambda piece: "SpecialToken" in piece, part.get("single", []))
        names = [piece["SpecialToken"]["id"] for piece in pieces]
        ids = [token for name in names for token in part["special_tokens"][name]["ids"]]
        return tuple(token for token in ids if token < vocab_size)
    return ()


def own_ids(path: Path, field: str, vocab_size: int) -> tuple[int, ...]:
    """Ids below `vocab_size` that a field of generation_config.json names; none where there is no such file."""
    return tuple(token for token in token_ids(_values(path).get(field), f"{path}: {field}") if token < vocab_size)


def token_ids(value: Any, where: str) -> tuple[int, ...]:
    """Ids from one, a list of them, or null. Raises ConfigError, with `where`, for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(f"{where}: {value!r}; must be a token id, a list of them, or null")
    return tuple(ids)


def _ids_of_names(folder: Path) -> dict[str, int]:
    """Names of special tokens -> ids, from whichever of the tokenizer's files has them."""
    found: dict[str, int] = {}
    tokenizer = _values(folder / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        found |= vocabulary
    found |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    for number, token in _values(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[_content(token)] = int(number)
    return found


def _content(token: Any) -> str:
    """The name of a token, which files give alone or with its properties."""
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _values(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
