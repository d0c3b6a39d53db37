"""A folder of transformers, or a checkpoint of nanoGPT, becomes a model folder.

notes = import_huggingface(Path("gpt2"), Path("models/gpt2"))
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.model_folder import FACTS_KEY, model_tensors, tokenizer_files
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles, read_json
from megasparse.config.loader import ConfigError, check_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.huggingface.architectures import NANOGPT, Architecture
from megasparse.conversion.huggingface.settings import read_settings
from megasparse.conversion.huggingface.tensors import Importer, has_own_head
from megasparse.conversion.sources import (
    TOKENIZER_NAMES,
    Tensors,
    TorchSource,
    open_torch_file,
    open_weights,
    write_weights,
)
from megasparse.data.build import open_tokenizer
from megasparse.data.facts import EndOfDocument
from megasparse.data.tokenizer import Tokenizer
from megasparse.inference.own_tokens import GENERATION, token_ids

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NANOGPT_FIELDS = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "block_size": "seq_length",
    "vocab_size": "vocab_size",
    "bias": "bias",
}


def import_huggingface(folder: Path, output: Path, *, dtype: torch.dtype | None = None, **options: Any) -> list[str]:
    """Write the model folder `output`; returns what the user should know.

    dtype: None keeps the dtypes. options: `max_file_bytes` and `replace` of ``ModelFolderWriter``. Raises ValueError,
    with `output` as it was, where files are missing or damaged, or for a model that ours cannot compute.
    """
    values = read_json(folder / "config.json")
    architecture, sections = read_settings(values)
    source = open_weights(folder)
    companions = tokenizer_files(folder)
    notes = _untie(sections["model"], source, architecture)
    texts = _generation(values, companions)
    if texts:
        companions.pop(GENERATION, None)
    facts = json.loads(source.metadata.get(FACTS_KEY, "{}")) if isinstance(source, TensorFiles) else {}
    recorded = EndOfDocument.recorded_in(facts, f"{folder}: facts of the model")
    sections["data"], end = _tokenizer_section(companions, texts, sections["model"]["vocab_size"], recorded, notes)
    facts["end_of_document"] = None if end is None else asdict(end)
    _write(
        output,
        sections,
        source,
        architecture,
        facts={**facts, "architecture": architecture.name},
        dtype=dtype,
        files=companions,
        texts=texts,
        **options,
    )
    return notes


def import_nanogpt(
    path: Path,
    output: Path,
    *,
    activation: str = "gelu_exact",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> list[str]:
    """Write the model folder `output` from a `ckpt.pt` as nanoGPT saves it; its optimizer state is not taken over.

    activation: `gelu_exact`, as nanoGPT computes it since 2023, or `gelu` for the approximation before; the file does
    not say which. Raises ValueError, with `output` as it was; a file that holds anything but data is not run.
    """
    content = open_torch_file(path)
    if not isinstance(content, dict) or not {"model", "model_args"} <= set(content):
        raise CheckpointError(f"{path}: no checkpoint of nanoGPT, which holds `model` and `model_args`")
    arguments = content["model_args"]
    missing = sorted(set(NANOGPT_FIELDS) - {"bias"} - set(arguments))
    if missing:
        raise CheckpointError(f"{path}: model_args lacks {', '.join(missing)}")
    # torch.compile puts a prefix before every name; the head is the table of the tokens.
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}
    model = {ours: arguments.get(theirs, True) for theirs, ours in NANOGPT_FIELDS.items()}
    source, facts = TorchSource(path, tensors), {"architecture": NANOGPT.name}
    notes = _untie(model, source, NANOGPT)
    if isinstance(content.get("iter_num"), int):
        facts["step"] = content["iter_num"]
    _write(
        output,
        {"model": {**model, "activation": activation}},
        source,
        NANOGPT,
        facts=facts,
        dtype=dtype,
        files={},
        **options,
    )
    return [
        *notes,
        "nanoGPT keeps no tokenizer in its checkpoint: set data.tokenizer in config.yaml before sampling text",
    ]


def _untie(model: dict[str, Any], source: Tensors, architecture: Architecture) -> list[str]:
    """Give a model that its configuration calls tied the head of its own that its file holds; a note says so."""
    if not model.get("tie_embeddings", True) or not has_own_head(source, architecture):
        return []
    model["tie_embeddings"] = False
    return [
        "the configuration says that head and embedding are one (tie_word_embeddings), the file holds another head: "
        "imported untied, with that head"
    ]


def _write(
    output: Path,
    sections: Mapping[str, Any],
    source: Tensors,
    architecture: Architecture,
    *,
    dtype: torch.dtype | None,
    **options: Any,
) -> None:
    importer = Importer(source, architecture, model_tensors(_run_config(sections, "fp32")))
    main_dtype = dtype or importer.dtype("embedding.tokens.weight")
    config = _run_config(sections, PRECISIONS.get(main_dtype, "fp32"))
    write_weights(importer, config, output, dtype=dtype, **options)


def _run_config(sections: Mapping[str, Any], precision: str) -> RunConfig:
    """A configuration that a dense run of this model could have."""
    return check_config(
        {
            **sections,
            "run": {"name": "converted"},
            "train": {"precision": precision},
            "sparsity": {"algorithm": "dense"},
        }
    )


def _generation(values: Mapping[str, Any], companions: Mapping[str, Path]) -> dict[str, str]:
    """generation_config.json as text, where config.json names token ids that the file does not; else nothing."""
    kept = read_json(companions[GENERATION]) if GENERATION in companions else {}
    for place, found in (("config.json", values), (GENERATION, kept)):
        for name in ("bos_token_id", "eos_token_id"):
            token_ids(found.get(name), f"{place}: {name}")
    missing = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None and kept.get(name) is None}
    return {GENERATION: json.dumps({**kept, **missing}, indent=1) + "\n"} if missing else {}


def _tokenizer_beside(
    companions: Mapping[str, Path], texts: Mapping[str, str], kind: str, recorded: EndOfDocument | None
) -> Tokenizer:
    """The tokenizer as it will lie in the model folder: files beside it say what ends a document, unless an export of
    ours has recorded it."""
    settings = {"data": {"tokenizer": kind}}
    name = TOKENIZER_NAMES[kind]
    with tempfile.TemporaryDirectory() as folder:
        for beside, path in companions.items():
            shutil.copyfile(path, Path(folder, beside))
        for beside, text in texts.items():
            Path(folder, beside).write_text(text, encoding="utf-8")
        try:
            settings["data"]["tokenizer_path"] = str(Path(folder, name))
            tokenizer = open_tokenizer(check_config(settings), recorded)
        except ValueError as error:
            raise ConfigError(str(error).replace(str(Path(folder)), str(companions[name].parent))) from None
    assert tokenizer is not None, "one is named"
    return tokenizer


def _tokenizer_section(
    companions: Mapping[str, Path],
    texts: Mapping[str, str],
    vocab_size: int,
    recorded: EndOfDocument | None,
    notes: list[str],
) -> tuple[dict[str, Any], EndOfDocument | None]:
    """Section `data` for a tokenizer that ours reads, and what ends its documents; without one, a note says why."""
    for kind, name in TOKENIZER_NAMES.items():
        if name not in companions:
            continue
        try:
            tokenizer = _tokenizer_beside(companions, texts, kind, recorded)
        except ValueError as error:
            notes.append(f"the tokenizer is copied and not used: {error}")
            return {}, None
        size = tokenizer.vocab_size
        if size > vocab_size:
            notes.append(f"the tokenizer is copied and not used: it has {size} entries, the model {vocab_size}")
            return {}, None
        return {"tokenizer": kind, "tokenizer_path": name}, EndOfDocument.of(tokenizer)
    allowed = " or ".join(TOKENIZER_NAMES.values())
    notes.append(f"there is no {allowed}: set data.tokenizer in config.yaml before sampling text")
    return {}, None
