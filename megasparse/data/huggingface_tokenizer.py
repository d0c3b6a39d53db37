"""A tokenizer.json, through the library `tokenizers` (extra `hf`).

The library looks for special tokens in every text. A page that tells of `<|endoftext|>` would end there, so here such
names are text like any other: the tokens themselves come from our own code only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np

from megasparse.data.vocabulary import END_OF_DOCUMENT_PIECES, declared_end_tokens, file_sha256, text_ids


class HuggingFaceTokenizer:
    """No special tokens are added to a text, none is read from it, and stored truncation and padding play no part.

    The library decides about threads itself (RAYON_NUM_THREADS); `num_threads` of `encode_batch` has no effect.
    """

    def __init__(self, path: str | PathLike[str], end_of_document: str | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ValueError(
                "the huggingface tokenizer needs the library `tokenizers`: pip install 'megasparse[hf]'"
            ) from error
        self.name = f"huggingface:{Path(path).name}"
        try:
            content = Path(path).read_text(encoding="utf-8")
            self._model = tokenizers.Tokenizer.from_str(content)
            values = json.loads(content)
        # The library raises a bare Exception for a file it cannot read.
        except Exception as error:
            raise ValueError(f"{fspath(path)}: not a tokenizer.json of the tokenizers library ({error})") from error
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the largest one counts, not their number.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.file_sha256: str | None = file_sha256(path)
        added = {token["content"]: token["special"] for token in values.get("added_tokens", [])}
        self.special_tokens = {content: vocabulary[content] for content, special in added.items() if special}
        """Ids of the tokens that no text spells, by their names: what a chat template may write."""
        reserved = {content for content, special in added.items() if special}
        end = self._find_end_of_document(path, end_of_document, vocabulary, reserved)
        self.end_of_document: str | None = end
        self.end_of_document_id = vocabulary[end]
        # An ordinary piece that the user has chosen is one that texts are made of.
        if end_of_document is None or end_of_document in added:
            reserved.add(end)
        self._encoder = self._model
        if _can_spell(values, reserved) or any(not added.get(name, True) for name in reserved):
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(_renamed(values, reserved)))
        self._encoder.encode_special_tokens = True
        # Stored for the batches of a model that reads 512 tokens, say: they would drop text, or add tokens to it.
        self._encoder.no_truncation()
        self._encoder.no_padding()

    def _find_end_of_document(self, path, wanted: str | None, vocabulary: dict[str, int], special: set[str]) -> str:
        if wanted is not None:
            names = [wanted]
        else:
            declared = declared_end_tokens(path, self.vocab_size)
            known = [self._model.id_to_token(token) if isinstance(token, int) else token for token in declared]
            # Special ones first: `</s>` is an ordinary token, of HTML, where `<eos>` ends texts.
            guesses = sorted(END_OF_DOCUMENT_PIECES, key=lambda name: name not in special)
            names = [*(name for name in known if name is not None), *guesses]
        for name in names:
            if name in vocabulary:
                return name
        raise ValueError(f"{fspath(path)}: no end-of-document token; looked for {', '.join(names)}")

    def encode(self, text: str) -> list[int]:
        return self._encoder.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
        rows = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(row.ids, np.int32) for row in rows]

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(text_ids(ids, self), skip_special_tokens=False)


def _can_spell(values: dict[str, Any], reserved: set[str]) -> bool:
    """Whether the model itself makes one of the reserved tokens from a text that spells it."""
    model = values["model"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return any(_makes(merge, model, reserved) for merge in model["merges"])
    return not reserved.isdisjoint(_pieces(model))


def _pieces(model: dict[str, Any]) -> list[str]:
    return [piece for piece, _ in model["vocab"]] if model["type"] == "Unigram" else list(model["vocab"])


def _makes(merge: str | list[str], model: dict[str, Any], reserved: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "") in reserved


def _renamed(values: dict[str, Any], reserved: set[str]) -> dict[str, Any]:
    """The same tokenizer with names for its reserved tokens that no text spells."""
    # U+FDD0 and U+FDD1 are no characters: Unicode keeps them for uses like this one.
    names = {name: f"\ufdd0{number}\ufdd1" for number, name in enumerate(sorted(reserved))}
    model = dict(values["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    if "merges" in model:
        parts = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            merge for merge in parts if not _makes(merge, model, reserved) and reserved.isdisjoint(merge)
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    added = [
        token | {"content": names.get(token["content"], token["content"])} for token in values.get("added_tokens", [])
    ]
    # A post-processor knows special tokens by name, and only adds them.
    return values | {"model": model, "added_tokens": added, "post_processor": None}
