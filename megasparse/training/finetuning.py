"""A model folder as the start of a fine-tuning run: the settings that follow from it.

    words = finetune_words(Path("models/pruned"))           # model.num_layers=2, sparsity.algorithm=static, ...
    config = load_config(files, [*words, *overrides])

A model with masks keeps them, and its zeros, to the end (`static`); `dense` trains all weights, zeros too, which is the
second half of SPDF (Thangarasa et al. 2023, arXiv 2303.10464). The optimizer is fresh either way.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.model_folder import ModelFolder, is_model_folder
from megasparse.config.loader import ConfigError, given_settings, load_config
from megasparse.config.schema import AttentionConfig, RunConfig, SparsityConfig, SparsityGroup
from megasparse.methods.mixed_sparsity import topology_density
from megasparse.models.build import build_model
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.schedule import PatternSchedule, pattern_at


def finetune_words(path: Path, *, dense: bool = False) -> list[str]:
    """Overrides that make a run start from the folder. Raises ValueError for what is no model folder, and for masks
    that do not belong to its layers."""
    if not is_model_folder(path):
        raise ConfigError(f"--model: {path}: no model folder there; must be one, see tools/convert_checkpoint.py")
    folder = ModelFolder(path)
    settings = {"train.init_from": str(path), **dict(_model(folder.config)), **dict(_tokenizer(folder.config))}
    settings |= dict(_attention(folder))
    settings |= {"sparsity.algorithm": "dense"} if dense or not folder.has_topology else dict(_masks(folder))
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]


def warmup_words(recipe: Path, files: Sequence[Path], overrides: Sequence[str]) -> list[str]:
    """A warm-up over half of the steps, with a warning, where the recipe's is longer and nothing else names one.

    files, overrides: what wins over the recipe. Raises ConfigError.
    """
    config = load_config([recipe, *files], overrides)
    own, steps = config.optimizer.warmup_steps, config.train.steps
    if own <= steps // 2 or "optimizer.warmup_steps" in given_settings(files, overrides):
        return []
    told = f"{steps // 2}, half of train.steps {steps}, in place of the {own} of {recipe.name}"
    warnings.warn(f"optimizer.warmup_steps: {told}", stacklevel=2)
    return [f"optimizer.warmup_steps={steps // 2}"]


def _model(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """What differs from the defaults; positions that begin anew with each example."""
    defaults = type(config.model)()
    for name, value in config.model.model_dump(mode="json").items():
        if value != getattr(defaults, name):
            yield f"model.{name}", value
    if config.model.position_embedding == "learned":
        yield "data.reset_positions", True


def _attention(folder: ModelFolder) -> Iterator[tuple[str, Any]]:
    """The pattern that the weights were trained under, from the first step to the last, with all that shapes it."""
    config, defaults = folder.config, AttentionConfig()
    schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
    pattern = pattern_at(config, int(folder.facts.get("step", 0)), schedule)
    if pattern == "full":
        return
    yield "attention.windows", [{"start": 0.0, "end": 1.0, "pattern": pattern}]
    given = config.attention.model_dump(mode="json")
    for name in ("stride", "stride_offsets", "overrides", "dense_fallback"):
        if getattr(config.attention, name) != getattr(defaults, name):
            yield f"attention.{name}", given[name]


def _tokenizer(config: RunConfig) -> Iterator[tuple[str, Any]]:
    for name in ("tokenizer", "tokenizer_path"):
        if getattr(config.data, name) is not None:
            yield f"data.{name}", getattr(config.data, name)


def _masks(folder: ModelFolder) -> Iterator[tuple[str, Any]]:
    """The layers and blocks of the folder's masks, and the density that they have together."""
    theirs = folder.config.sparsity
    groups = [SparsityGroup(pattern=g.pattern, dense=g.dense, block_size=g.block_size) for g in theirs.groups]
    sparsity = SparsityConfig(
        algorithm="static",
        block_size=theirs.block_size,
        head=theirs.head,
        low_rank=theirs.low_rank,
        groups=groups,
        lr_density_power=0.0,
    )
    config = folder.config.model_copy(update={"sparsity": sparsity})
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size or 0)
    density = topology_density(folder, Controller(config, model.sparse_layers()))
    if density is None:
        raise ConfigError(
            f"--model: {folder.folder}: its topology.safetensors is of other layers or blocks than its config.yaml "
            "says; must be of the same"
        )
    if density == 1.0:
        yield "sparsity.algorithm", "dense"
        return
    given = sparsity.model_dump(mode="json", exclude_unset=True)
    # Only what a group says: the rest follows the section.
    given["groups"] = [group.model_dump(exclude_defaults=True) for group in groups]
    yield from ((f"sparsity.{name}", value) for name, value in {**given, "density": density}.items())
