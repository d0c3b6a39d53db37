"""A run's checkpoint or a model folder becomes a folder that transformers opens.

notes = export_huggingface(open_source(Path("runs/x")), Path("exported"))
model = AutoModelForCausalLM.from_pretrained("exported")
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.model_folder import FACTS_KEY, model_tensors
from megasparse.checkpoint.tensor_files import MAX_FILE_BYTES, TensorFileWriter, read_json
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.conversion.huggingface.architectures import ARCHITECTURES, Architecture
from megasparse.conversion.huggingface.card import model_card
from megasparse.conversion.huggingface.settings_out import choose_architecture, write_settings
from megasparse.conversion.huggingface.tensors import Exporter
from megasparse.conversion.huggingface.tokenizer_out import SETTINGS, tokenizer_out
from megasparse.conversion.sources import Source, source_tokenizer
from megasparse.inference.own_tokens import GENERATION, own_ids
from megasparse.sparsity.schedule import PatternSchedule, pattern_at
from megasparse.utils.files import write_at_once, write_json
from megasparse.utils.folders import new_folder

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_huggingface(
    source: Source,
    output: Path,
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    replace: bool = False,
) -> list[str]:
    """Write the folder `output`; returns what the user should know.

    architecture: None takes the one that the model came from, or else the first that computes it. dtype: None keeps the
    dtypes. Raises ValueError, with `output` as it was, where nothing of transformers computes this model.
    """
    config = source.config
    chosen = _choose(config, architecture, source.facts)
    exporter = Exporter(source, chosen, model_tensors(_as_exported(config, chosen)), dtype)
    files, tokenizer_settings, tokenizer_notes = tokenizer_out(source)
    specs, notes = exporter.specs, [*_notes(config, source.facts), *tokenizer_notes]
    facts = {**source.facts, "architecture": chosen.name}
    metadata = {"format": "pt", FACTS_KEY: json.dumps(facts)}
    with new_folder(output, replace=replace) as partial:
        writer = TensorFileWriter(partial, specs, metadata, max_file_bytes)
        zeros = 0
        try:
            for name, tensor in exporter.tensors():
                writer.write(name, tensor)
                zeros += tensor.numel() - int(tensor.count_nonzero())
            writer.close()
        finally:
            writer.abandon()
        for name, path in files.items():
            shutil.copyfile(path, partial / name)
        generation = _generation(source)
        ids = {name: generation.get(name) for name in TOKEN_IDS}
        main_dtype = specs[next(iter(specs))].dtype
        values = {**write_settings(chosen, config), **ids, "torch_dtype": DTYPE_NAMES[main_dtype]}
        write_json(partial / "config.json", values, indent=2)
        if GENERATION not in source.files or generation != read_json(source.files[GENERATION]):
            write_json(partial / GENERATION, generation, indent=2)
        if tokenizer_settings is not None:
            write_json(partial / SETTINGS, tokenizer_settings, indent=2)
        numbers = sum(spec.num_bytes // spec.dtype.itemsize for spec in specs.values())
        write_at_once(partial / "README.md", model_card(config, facts, DTYPE_NAMES[main_dtype], numbers, zeros, notes))
    return notes


def _choose(config: RunConfig, wanted: str | None, facts: dict[str, Any]) -> Architecture:
    origin = facts.get("architecture")
    if wanted is None and origin in ARCHITECTURES:
        try:
            return choose_architecture(config, origin)
        except ConfigError:
            # The model has changed since, in a setting that its architecture does not have.
            pass
    return choose_architecture(config, wanted)


def _as_exported(config: RunConfig, architecture: Architecture) -> RunConfig:
    """With the biases that every module of the architecture has."""
    if not architecture.has_biases:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"bias": True, "qkv_bias": None})})


def _notes(config: RunConfig, facts: dict[str, Any]) -> list[str]:
    schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
    pattern = pattern_at(config, facts.get("step", 0), schedule)
    if pattern == "full" or config.attention.sliding_window is not None:
        return []
    return [
        f"the weights were trained last under the attention pattern {pattern} of stride {config.attention.stride}; "
        "transformers computes full attention, so results differ from ours"
    ]


def _generation(source: Source) -> dict[str, Any]:
    """generation_config.json: where texts begin and end, in the ids that sampling here uses.

    The model's own ids are kept, one or several; where it names no end, the tokenizer's. Null where nothing is known,
    or transformers would guess.
    """
    vocab_size = source.config.model.vocab_size
    assert vocab_size is not None, "a source has a whole configuration"
    values: dict[str, Any] = {name: None for name in TOKEN_IDS}
    if GENERATION in source.files:
        values = read_json(source.files[GENERATION])
        if own_ids(source.files[GENERATION], "eos_token_id", vocab_size):
            return values
    tokenizer = source_tokenizer(source)
    if tokenizer is None:
        return values
    end = tokenizer.end_of_document_id
    return {**values, "eos_token_id": end, "pad_token_id": end}
