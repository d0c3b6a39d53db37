"""Model folders as saved states, and saved states as model folders: weights and masks, the vocabulary not padded.

source = open_source(path)                        # a run or a model folder
write_model_folder(WeightsState(source), source.config, source.files, Path("exported"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.saved_state import WEIGHT, RunFacts, SavedState
from megasparse.config.schema import RunConfig
from megasparse.conversion.sources import Source, Tensors, portable_config, write_weights


class PlainTensors:
    """Weights without anything else known of them: a ``SavedState``."""

    step = 0

    def __init__(self, tensors: Tensors) -> None:
        self.tensors, self.facts = tensors, RunFacts(0, {}, {}, [])
        self.shapes = {name: tensors.shape(name) for name in tensors.names}

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def tensor(self, name: str, kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        return self.tensors.tensor(name)

    def topology(self) -> dict[str, Tensor]:
        return {}

    def loss_scaler(self) -> dict[str, float]:
        return {}

    def division(self, name: str) -> dict[str, Any]:
        return {}


class WeightsState(PlainTensors):
    """The weights and masks of a source without optimizer and position: a ``SavedState``."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        known, self._source = dict(source.facts), source
        self.facts = RunFacts(int(known.get("step", 0)), source.config.model.model_dump(mode="json"), known, [])

    def topology(self) -> dict[str, Tensor]:
        return self._source.topology()


class _StateWeights:
    """The weights of a saved state, as a model folder is written from them."""

    def __init__(self, saved: SavedState) -> None:
        self.saved = saved

    def dtype(self, name: str) -> torch.dtype:
        return self.tensor(name).dtype

    def tensor(self, name: str) -> Tensor:
        return self.saved.tensor(name, WEIGHT)


def write_model_folder(
    saved: SavedState,
    config: RunConfig,
    files: Mapping[str, Path],
    output: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write weights and masks of `saved`, whose vocabulary is not padded, as a model folder.

    files: of the tokenizer, by the names that they get. Raises CheckpointError, and leaves nothing, where `output`
    holds something already.
    """
    write_weights(
        _StateWeights(saved),
        portable_config(config, files),
        output,
        facts=saved.facts.train_state,
        files=files,
        topology=saved.topology(),
        progress=progress,
    )
