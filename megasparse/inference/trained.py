"""A model that a run has trained, as it stood at one of its checkpoints, or that of a model folder, ready to be asked.

trained = open_trained(Path("runs/quickstart-mst"))
text = sample_text(trained.model, trained.tokenizer, "def ", 200, seed=0, end_tokens=trained.end_tokens)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megasparse.checkpoint.model_folder import ModelFolder, is_model_folder, load_weights
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import find_checkpoint, load_model_weights, passed_over
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import Pattern, RunConfig
from megasparse.config.stages import stage_of
from megasparse.config.tensor_train import without_tensor_train
from megasparse.data.build import open_tokenizer, vocabulary_size
from megasparse.data.facts import EndOfDocument
from megasparse.data.record import recorded_end
from megasparse.data.tokenizer import Tokenizer
from megasparse.inference.own_tokens import begin_token, end_tokens, leading_tokens
from megasparse.layers.quantized import replace_linear_layers
from megasparse.layers.tensor_train import with_matrices
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import shard_spec_of
from megasparse.sparsity.schedule import PatternSchedule, pattern_at


@dataclass(frozen=True)
class TrainedModel:
    """The model in float32, in evaluation mode, under the attention patterns of its last training step."""

    config: RunConfig
    model: GPT
    tokenizer: Tokenizer
    step: int
    pattern: Pattern
    passed_over: list[str]
    """Why checkpoints newer than this one were not used."""
    end_tokens: tuple[int, ...] | None = None
    """Those that end a text, where the model names its own; None: the tokenizer's end of a document."""
    begin_token: int | None = None
    """What stands before a text, likewise."""
    leading_tokens: tuple[int, ...] = ()
    """What transformers' tokenizer of the same files puts before every text; ours adds nothing."""


def open_trained(run_folder: Path, step: int | None = None, device: torch.device | str = "cpu") -> TrainedModel:
    """Read a run's configuration, tokenizer and weights; `step` None takes the newest good checkpoint.

    run_folder: or a model folder, which has no steps. Raises ValueError naming what is missing: the run, the checkpoint
    or its step, the tokenizer.
    """
    if is_model_folder(run_folder):
        return _open_model_folder(run_folder, step, device)
    if not (run_folder / "config.yaml").is_file():
        raise ConfigError(
            f"{run_folder}: no run there; must be a run folder or a model folder, which hold a config.yaml"
        )
    config = load_config([run_folder / "config.yaml"])
    folder, index = find_checkpoint(run_folder, step)
    config, train = without_tensor_train(stage_of(config, index.model)), config.tensor_train
    newer = passed_over(run_folder) if step is None else []
    trained = _untrained(config, run_folder, index.step, newer, recorded_end(run_folder))
    try:
        specs = {name: shard_spec_of(parameter) for name, parameter in trained.model.named_parameters()}
        trained.model.load_state_dict(with_matrices(load_model_weights(folder), specs, train))
    except RuntimeError as error:
        raise CheckpointError(f"checkpoint {folder} does not fit {run_folder / 'config.yaml'}: {error}") from None
    trained.model.to(device)
    return trained


def _open_model_folder(path: Path, step: int | None, device: torch.device | str) -> TrainedModel:
    if step is not None:
        raise ConfigError(f"step: {step}; must be unset: {path} is a model folder")
    folder = ModelFolder(path)
    end = EndOfDocument.recorded_in(folder.facts, path)
    trained = _untrained(folder.config, path, folder.facts.get("step", 0), [], end)
    load_weights(trained.model, folder)
    if folder.quantization is not None and folder.quantization.activations == "int8":
        replace_linear_layers(trained.model, dict(folder.quantized_layers()))
    trained.model.to(device)
    tokenizer, vocab_size = trained.tokenizer, trained.model.vocab_size
    begin = begin_token(path, tokenizer, vocab_size)
    return replace(
        trained,
        end_tokens=end_tokens(path, tokenizer, vocab_size),
        begin_token=begin,
        leading_tokens=leading_tokens(path, begin, vocab_size),
    )


def _untrained(
    config: RunConfig, folder: Path, step: int, passed_over: list[str], end: EndOfDocument | None
) -> TrainedModel:
    """All but the weights. Masks are not needed: inactive weights are 0, and a product with zeros is exact.

    end: of documents, as is recorded with the model.
    """
    tokenizer = open_tokenizer(config, end)
    if tokenizer is None:
        raise ConfigError(f"data.tokenizer: unset in {folder / 'config.yaml'}, so text cannot become tokens")
    model = build_model(config, vocabulary_size(config, tokenizer)).eval()
    schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
    pattern = pattern_at(config, step, schedule)
    model.set_attention_patterns(schedule.layer_patterns(pattern))
    return TrainedModel(config, model, tokenizer, step, pattern, passed_over)
