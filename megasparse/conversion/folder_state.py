"""Model folders as saved states, and saved states as model folders: weights and masks, the vocabulary not padded.

source = open_source(path)                        # a run or a model folder
write_model_folder(WeightsState(source), source.config, source.files, Path("exported"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.checkpoint.saved_state import WEIGHT, RunFacts, SavedState
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.schema import RunConfig
from megasparse.conversion.sources import Source, portable_config


class WeightsState:
    """The weights of a source without optimizer and position: a ``SavedState``."""

    step = 0

    def __init__(self, source: Source) -> None:
        self.source = source
        self.shapes = {name: source.shape(name) for name in source.names}
        config, known = source.config, dict(source.facts)
        self.facts = RunFacts(int(known.get("step", 0)), config.model.model_dump(mode="json"), known, [])

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def tensor(self, name: str, kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        return self.source.tensor(name)

    def topology(self) -> dict[str, Tensor]:
        path = self.source.topology_file
        try:
            return {} if path is None else load_file(path)
        except Exception as error:
            raise CheckpointError(f"{path}: not readable: {error}") from None

    def loss_scaler(self) -> dict[str, float]:
        return {}

    def division(self, name: str) -> dict[str, Any]:
        return {}


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
    dtypes, done = {name: saved.tensor(name, WEIGHT).dtype for name in saved.shapes}, 0
    facts, config = saved.facts.train_state, portable_config(config, files)
    with ModelFolderWriter(output, config, dtypes, facts=facts) as writer:
        for name in writer.names:
            tensor = saved.tensor(name, WEIGHT)
            writer.write(name, tensor)
            done += 4 * prod(tensor.shape)
            progress(done)
        for name, path in files.items():
            writer.copy(name, path)
        topology = saved.topology()
        if topology:
            writer.topology(topology)
