"""Whether a run can learn from the teacher that `distillation.teacher` names, and what the user should know of it.

    warnings = distillation_warnings(config, vocab_size)            # before any process group, for the plan

Plans ask here without importing DeepSpeed; ``teacher`` opens the folder for the run.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

from megasparse.checkpoint.model_folder import ModelFolder, is_model_folder
from megasparse.config.checks import check_tensor_parallel
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig, SparsityConfig
from megasparse.config.tensor_train import without_tensor_train
from megasparse.cost.resources import BYTES
from megasparse.data.vocabulary import file_sha256
from megasparse.objectives.stored_states import check_states


def distillation_warnings(config: RunConfig, vocab_size: int) -> list[str]:
    """Empty where there is no teacher. Raises ConfigError for one that this run cannot learn from."""
    distillation = config.distillation
    if distillation.teacher is None:
        return []
    path = Path(distillation.teacher)
    if not is_model_folder(path):
        raise ConfigError(
            f"distillation.teacher: {path}: no model folder there; must be unset, or a folder that "
            "tools/convert_checkpoint.py has made"
        )
    if config.stacking.num_layers is not None:
        raise ConfigError(
            f"stacking.num_layers: {config.stacking.num_layers} with distillation.teacher; must be unset: the blocks "
            "that are compared would change"
        )
    folder = ModelFolder(path)
    _check_vocabulary(vocab_size, folder)
    _check_shapes(config, folder)
    try:
        check_tensor_parallel(teacher_config(config, folder))
    except ConfigError as error:
        raise ConfigError(f"distillation.teacher: {path}: {error}") from None
    if distillation.states is not None:
        check_states(config, folder)
    return _tokenizer_warnings(config, folder)


def teacher_config(config: RunConfig, folder: ModelFolder) -> RunConfig:
    """The run's configuration with the model of the folder, all its weights active."""
    # Padding of the vocabulary as the student has it, so that their logits are divided alike.
    model = folder.config.model.model_copy(update={"vocab_size_multiple": config.model.vocab_size_multiple})
    changes = {"model": model, "attention": folder.config.attention, "sparsity": SparsityConfig(algorithm="dense")}
    return without_tensor_train(config.model_copy(update=changes))


def teacher_bytes(config: RunConfig, world_size: int) -> int:
    """What the teacher's weights need on a rank, but for the layer that stage 3 has together; 0 without one."""
    if config.distillation.teacher is None or config.distillation.states is not None:
        return 0
    folder = ModelFolder(Path(config.distillation.teacher))
    ranks = world_size if config.deepspeed.zero_stage == 3 else config.parallel.tensor_parallel_size
    return sum(prod(folder.shape(name)) for name in folder.names) * BYTES[config.train.precision] // ranks


def check_response_tokens(config: RunConfig, *, supervised: bool) -> None:
    """Raise ConfigError where answers are asked for and the data has none."""
    distillation = config.distillation
    asks = distillation.teacher is not None and distillation.hidden_weight and distillation.tokens == "response"
    if asks and not supervised:
        raise ConfigError(
            "distillation.tokens: response needs supervised data (tools/preprocess_data.py --supervised) in "
            "data.train; must be all, non_padding"
        )


def _check_vocabulary(vocab_size: int, folder: ModelFolder) -> None:
    if folder.config.model.vocab_size != vocab_size:
        raise ConfigError(
            f"distillation.teacher: {folder.folder} has a vocabulary of {folder.config.model.vocab_size} entries, the "
            f"run one of {vocab_size}; must be a teacher of the same vocabulary"
        )


def _check_shapes(config: RunConfig, folder: ModelFolder) -> None:
    distillation, ours, theirs = config.distillation, config.model, folder.config.model
    where = folder.folder
    if folder.config.sparsity.low_rank:
        raise ConfigError(
            f"distillation.teacher: {where} has low-rank branches (sparsity.low_rank "
            f"{folder.config.sparsity.low_rank}); must be a model without"
        )
    if theirs.position_embedding == "learned" and theirs.seq_length < ours.seq_length:
        raise ConfigError(
            f"model.seq_length: {ours.seq_length} exceeds the {theirs.seq_length} positions of distillation.teacher "
            f"{where}; must be at most {theirs.seq_length}"
        )
    if not distillation.hidden_weight:
        return
    if theirs.hidden_size != ours.hidden_size:
        raise ConfigError(
            f"distillation.teacher: {where} has hidden_size {theirs.hidden_size}, the run {ours.hidden_size}; must be "
            f"equal where distillation.hidden_weight is not 0"
        )
    if distillation.layer_map is None and theirs.num_layers != ours.num_layers:
        raise ConfigError(
            f"distillation.layer_map: unset, but the teacher has {theirs.num_layers} layers and the student "
            f"{ours.num_layers}; must be pairs [block of the student, block of the teacher]"
        )
    for student, teacher in distillation.layer_map or ():
        for name, block, limit in (("student", student, ours.num_layers), ("teacher", teacher, theirs.num_layers)):
            if block >= limit:
                raise ConfigError(
                    f"distillation.layer_map: the {name} has no block {block}; must be 0 to {limit - 1} there"
                )


def _tokenizer_warnings(config: RunConfig, folder: ModelFolder) -> list[str]:
    paths = [config.data.tokenizer_path, folder.config.data.tokenizer_path]
    if any(path is None or not Path(path).is_file() for path in paths):
        return []
    own, theirs = (file_sha256(str(path)) for path in paths)
    if own == theirs:
        return []
    return [
        f"data.tokenizer_path: {paths[0]} and the teacher's {paths[1]} are different files; their tokens must mean the "
        "same"
    ]
