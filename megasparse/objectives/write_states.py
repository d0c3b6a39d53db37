"""Writes the hidden states of a run's teacher on the samples that the run will read; ``stored_states`` reads them.

write_states(config, Path("states"), dtype="bfloat16", progress=progress)

One process holds the teacher, in float32, and one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder, load_weights
from megasparse.checkpoint.tensor_files import save_tensors
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.data import Batch, split_samples
from megasparse.data.build import build_data, open_tokenizer, vocabulary_size
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.objectives.checks import distillation_warnings, teacher_config
from megasparse.objectives.stored_states import (
    DESCRIPTION,
    DTYPES,
    KEYS,
    NORMED,
    STATES,
    StatesDescription,
    expected_description,
    needed_states,
    sample_keys,
)
from megasparse.sparsity.schedule import PatternSchedule, pattern_at
from megasparse.utils.files import failures_named, write_json
from megasparse.utils.folders import new_folder


def write_states(
    config: RunConfig,
    output: Path,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StatesDescription:
    """Write the folder; it is whole or absent. progress: takes bytes done and their total.

    Raises ConfigError where the run has no teacher that it could learn hidden states from.
    """
    if config.distillation.teacher is None or not config.distillation.hidden_weight:
        field = "hidden_weight: 0" if config.distillation.teacher else "teacher: unset"
        raise ConfigError(f"distillation.{field}; must be set: its hidden states are what is written")
    alone = config.distillation.model_copy(update={"states": None})
    vocab_size = vocabulary_size(config, open_tokenizer(config))
    distillation_warnings(config.model_copy(update={"distillation": alone}), vocab_size)
    folder = ModelFolder(Path(config.distillation.teacher))
    teacher = _teacher(config, folder, vocab_size).to(device)
    dataset, _ = build_data(config, vocab_size)
    samples_read = config.train.steps * config.train.global_batch_size
    keys, numbers = _different_samples(dataset, samples_read)
    names = needed_states(config, len(teacher.layers))
    shape = (len(numbers), len(names), config.model.seq_length, folder.config.model.hidden_size)
    fields: dict[str, Any] = {"states": names, "num_blocks": len(teacher.layers), "dtype": dtype, "shape": shape}
    found = StatesDescription(samples_read=samples_read, **expected_description(config, folder), **fields)
    total, done = int(np.prod(shape)) * DTYPES[dtype].itemsize, 0
    with new_folder(output) as partial, failures_named(output / STATES), (partial / STATES).open("wb") as file:
        for number in numbers:
            values = _states(teacher, _batch(dataset, number), names).to("cpu", DTYPES[dtype])
            done += file.write(values.contiguous().view(torch.uint8).numpy().data)
            progress(done, total)
        file.flush()
        save_tensors(
            {"keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).copy()).view(-1, 16)}, partial / KEYS
        )
        write_json(partial / DESCRIPTION, found.model_dump(mode="json"))
    return found


def _teacher(config: RunConfig, folder: ModelFolder, vocab_size: int) -> GPT:
    """The whole model in float32, under the attention pattern of its last training step."""
    theirs = folder.config
    model = build_model(teacher_config(config, folder), vocab_size, drawn=False).eval().requires_grad_(False)
    load_weights(model, folder)
    schedule = PatternSchedule(theirs.attention, theirs.model.num_layers, theirs.model.num_attention_heads)
    model.set_attention_patterns(
        schedule.layer_patterns(pattern_at(theirs, int(folder.facts.get("step", 0)), schedule))
    )
    return model


def _batch(dataset: Any, number: int) -> Batch:
    # The share of targets plays no part in what a teacher reads.
    return split_samples(torch.from_numpy(dataset[number]).unsqueeze(0), 1.0)


def _different_samples(dataset: Any, count: int) -> tuple[list[bytes], list[int]]:
    """Keys and numbers of the global samples [0, count), each sample once, however many epochs there are."""
    first = dict(_latest_first(dataset, count))
    ordered = sorted(first.items(), key=lambda item: item[1])
    return [key for key, _ in ordered], [number for _, number in ordered]


def _latest_first(dataset: Any, count: int) -> Iterator[tuple[bytes, int]]:
    for number in reversed(range(count)):
        yield sample_keys(_batch(dataset, number))[0], number


@torch.inference_mode()
def _states(teacher: GPT, batch: Batch, names: list[str]) -> Tensor:
    """[states, T, C] of one sample."""
    device = next(teacher.parameters()).device
    documents = None if batch.documents is None else batch.documents.to(device)
    outputs: list[Tensor] = []
    normed = teacher.hidden_states(batch.inputs.to(device), documents, outputs=outputs)
    return torch.cat([normed if name == NORMED else outputs[int(name)] for name in names])
