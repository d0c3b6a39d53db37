"""What transformers must be told of a tokenizer that an exported model takes along, so that it gives the same ids.

    files, settings, notes = tokenizer_out(source)      # files to copy, content of tokenizer_config.json or None

A lone tokenizer.json says all but its class. A lone SentencePiece model would be opened by what is usual for the
model's architecture, with other ids: transformers is told to take it as Llama's, which computes what SentencePiece does
for BPE with bytes for unknown characters and no space put before a text. For other SentencePiece models nothing is
written, and a note says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megasparse.conversion.sources import TOKENIZER_NAMES, Source, source_tokenizer
from megasparse.data.tokenizer import SPACE_MARK

SETTINGS = "tokenizer_config.json"
NORMALISED = "\ufb01\u2460 \u00e9e\u0301\uff21  x"
"""Characters and white space that the usual normalisations of SentencePiece change."""


def tokenizer_out(source: Source) -> tuple[dict[str, Path], dict[str, Any] | None, list[str]]:
    """Files to copy, the content of tokenizer_config.json where one must be written, and notes for the user."""
    files = dict(source.files)
    tokenizer = source_tokenizer(source)
    if SETTINGS in files or tokenizer is None:
        # Made by transformers, or a tokenizer that is copied and not used.
        return files, None, []
    settings = {"eos_token": tokenizer.end_of_document, "model_max_length": source.config.model.seq_length}
    if TOKENIZER_NAMES["huggingface"] in files:
        return files, {"tokenizer_class": "PreTrainedTokenizerFast", **settings}, []
    name = TOKENIZER_NAMES["sentencepiece"]
    if name not in files:
        return files, None, []
    obstacle, as_llama = _as_llama(files[name])
    if obstacle is None:
        return files, {**as_llama, **settings}, []
    del files[name]
    return files, None, [f"no tokenizer is written, transformers would give other ids for it: {obstacle}"]


def _as_llama(path: Path) -> tuple[str | None, dict[str, Any]]:
    """Why transformers' Llama tokenizer gives other ids than this model, or None with the settings that it needs."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = model.vocab_size()
    ordinary = [i for i in range(size) if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    # BPE scores pieces by the number of their merge; unigram models by the logarithm of a probability.
    if any(model.get_score(i) != int(model.get_score(i)) for i in ordinary):
        return "it is a unigram model, must be BPE", {}
    if not model.is_byte(model.piece_to_id("<0x0A>")):
        return "it has no pieces for bytes", {}
    if model.encode("a", out_type=str)[0].startswith(SPACE_MARK):
        # transformers 5 puts none before a text that begins with a space; SentencePiece does.
        return "it puts a space before each text", {}
    if model.normalize(NORMALISED) != NORMALISED.replace(" ", SPACE_MARK):
        return "it changes characters or white space before it looks for pieces", {}
    controls = {model.id_to_piece(i) for i in range(size) if model.is_control(i)}
    return None, {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_prefix_space": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>" if "<s>" in controls else None,
        "unk_token": model.id_to_piece(model.unk_id()),
    }
