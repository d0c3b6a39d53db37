"""Model folders as saved states, and saved states as model folders.

saved = ModelFolderState(ModelFolder(path))
write_model_folder(saved, config, Path("exported"))
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from megasparse.checkpoint.model_folder import VOCABULARY_TENSORS, ModelFolder, ModelFolderWriter
from megasparse.checkpoint.saved_state import WEIGHT, RunFacts, SavedState
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig


class ModelFolderState:
    """A model folder as the state of a run before its first step."""

    step = 0

    def __init__(self, folder: ModelFolder) -> None:
        self.source = folder
        self.shapes = {name: folder.shape(name) for name in folder.names}
        self.facts = RunFacts(0, folder.config.model.model_dump(mode="json"), {}, [])

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def tensor(self, name: str, kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        return self.source.tensor(name)

    def topology(self) -> dict[str, Tensor]:
        return self.source.topology()

    def loss_scaler(self) -> dict[str, float]:
        return {}

    def division(self, name: str) -> dict[str, Any]:
        return {}


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """The configuration with the size of the vocabulary that the tokenizer has settled."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": vocab_size})})


def write_model_folder(
    saved: SavedState, config: RunConfig, output: Path, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Write weights and masks of `saved` as a model folder; rows that pad the vocabulary are left out.

    Raises CheckpointError, and leaves nothing, where `output` is there already.
    """
    vocab_size, done = config.model.vocab_size, 0
    if vocab_size is None:
        raise ConfigError("model.vocab_size: unset; legal values: the number of entries of the tokenizer")
    dtypes = {name: saved.tensor(name, WEIGHT).dtype for name in saved.shapes}
    with ModelFolderWriter(output, config, dtypes, facts={"step": saved.facts.step}) as writer:
        for name in writer.names:
            tensor = saved.tensor(name, WEIGHT)
            if name in VOCABULARY_TENSORS and tensor.shape[0] > vocab_size:
                tensor = tensor[:vocab_size]
            writer.write(name, tensor)
            done += 4 * prod(tensor.shape)
            progress(done)
        topology = saved.topology()
        if topology:
            _check_unpadded_head(saved, vocab_size, topology)
            writer.topology(topology)


def _check_unpadded_head(saved: SavedState, vocab_size: int, topology: dict[str, Tensor]) -> None:
    """Masks of a sparse head are those of a padded table, which a model folder has not."""
    rows = saved.shapes[VOCABULARY_TENSORS[0]][0]
    if "live/head" in topology and rows != vocab_size:
        raise CheckpointError(
            f"sparsity.head: the masks are of {rows} rows, the vocabulary has {vocab_size}; legal values: false, or a "
            "vocabulary that needs no padding"
        )
