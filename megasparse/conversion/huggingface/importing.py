"""A folder of transformers, or a checkpoint of nanoGPT, becomes a model folder.

notes = import_huggingface(Path("gpt2"), Path("models/gpt2"))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.model_folder import FACTS_KEY, ModelFolderWriter, model_tensors, tokenizer_files
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import MAX_FILE_BYTES, TensorFiles, read_json
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.huggingface.architectures import NANOGPT, Architecture
from megasparse.conversion.huggingface.settings import read_settings
from megasparse.conversion.huggingface.tensors import Importer, Tensors
from megasparse.conversion.sources import TOKENIZER_NAMES, TorchSource, open_torch_file
from megasparse.data.tokenizer import load_tokenizer

PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
NANOGPT_FIELDS = {
    "n_layer": "num_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "block_size": "seq_length",
    "vocab_size": "vocab_size",
    "bias": "bias",
}
Progress = Callable[[int], None]


def import_huggingface(
    folder: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    replace: bool = False,
    progress: Progress = lambda done: None,
) -> list[str]:
    """Write the model folder `output`; returns what the user should know.

    dtype: None keeps the dtypes. Raises ValueError, with `output` as it was, where files are missing or damaged, or for
    a model that ours cannot compute.
    """
    values = read_json(folder / "config.json")
    architecture, sections = read_settings(values)
    source = _open_weights(folder)
    companions = tokenizer_files(folder)
    notes: list[str] = []
    sections["data"] = _tokenizer_section(companions, sections["model"]["vocab_size"], notes)
    facts = json.loads(source.metadata.get(FACTS_KEY, "{}")) if isinstance(source, TensorFiles) else {}
    texts = {}
    if GENERATION not in companions:
        ids = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
        texts = {GENERATION: json.dumps(ids, indent=1) + "\n"} if ids else {}
    _write(
        output,
        sections,
        source,
        architecture,
        facts={**facts, "architecture": architecture.name},
        dtype=dtype,
        companions=companions,
        texts=texts,
        options={"max_file_bytes": max_file_bytes, "replace": replace},
        progress=progress,
    )
    return notes


def import_nanogpt(
    path: Path,
    output: Path,
    *,
    activation: str = "gelu_exact",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    replace: bool = False,
    progress: Progress = lambda done: None,
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
    facts = {"architecture": NANOGPT.name}
    if isinstance(content.get("iter_num"), int):
        facts["step"] = content["iter_num"]
    _write(
        output,
        {"model": {**model, "activation": activation}},
        TorchSource(path, tensors),
        NANOGPT,
        facts=facts,
        dtype=dtype,
        companions={},
        texts={},
        options={"max_file_bytes": max_file_bytes, "replace": replace},
        progress=progress,
    )
    return ["nanoGPT keeps no tokenizer in its checkpoint: set data.tokenizer in config.yaml before sampling text"]


def _write(
    output: Path,
    sections: Mapping[str, Any],
    source: Tensors,
    architecture: Architecture,
    *,
    facts: Mapping[str, Any],
    dtype: torch.dtype | None,
    companions: Mapping[str, Path],
    texts: Mapping[str, str],
    options: Mapping[str, Any],
    progress: Progress,
) -> None:
    config = _run_config(sections, "fp32")
    importer = Importer(source, architecture, model_tensors(config))
    dtypes = {name: dtype or importer.dtype(name) for name in model_tensors(config)}
    config = _run_config(sections, PRECISIONS.get(dtypes["embedding.tokens.weight"], "fp32"))
    done = 0
    with ModelFolderWriter(output, config, dtypes, facts=facts, **options) as writer:
        for name in writer.names:
            writer.write(name, importer.tensor(name))
            done += writer.specs[name].num_bytes
            progress(done)
        for name, path in companions.items():
            writer.copy(name, path)
        for name, text in texts.items():
            writer.write_text(name, text)


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


def _open_weights(folder: Path) -> Tensors:
    """Safetensors, or else a single file of torch."""
    pickled = folder / "pytorch_model.bin"
    if not any(folder.glob("*.safetensors*")) and pickled.is_file():
        content = open_torch_file(pickled)
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(f"{pickled}: holds something else than tensors by name")
        return TorchSource(pickled, content)
    return TensorFiles(folder)


def _tokenizer_section(companions: Mapping[str, Path], vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """Section `data` for a tokenizer that ours reads; without one, a note says why."""
    for kind, name in TOKENIZER_NAMES.items():
        if name not in companions:
            continue
        try:
            size = load_tokenizer(kind, companions[name]).vocab_size
        except ValueError as error:
            notes.append(f"the tokenizer is copied and not used: {error}")
            return {}
        if size > vocab_size:
            notes.append(f"the tokenizer is copied and not used: it has {size} entries, the model {vocab_size}")
            return {}
        return {"tokenizer": kind, "tokenizer_path": name}
    allowed = " or ".join(TOKENIZER_NAMES.values())
    notes.append(f"there is no {allowed}: set data.tokenizer in config.yaml before sampling text")
    return {}
