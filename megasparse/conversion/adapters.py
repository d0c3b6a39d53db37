"""An adapter put into the model that it was trained on: a model folder like any other.

merge_adapter(Path("models/base"), Path("runs/tuned/adapter.safetensors"), Path("models/tuned"))
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megasparse.checkpoint.adapter_file import Adaptation, folder_digest, read_adapter
from megasparse.checkpoint.model_folder import ModelFolder
from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import ConfigError
from megasparse.conversion.sources import open_source, portable_config, write_weights


class _Merged:
    """The weights of a model folder with an adapter in them, in the folder's dtypes."""

    def __init__(self, folder: ModelFolder, adaptation: Adaptation) -> None:
        self._folder, self._adaptation = folder, adaptation

    def dtype(self, name: str) -> torch.dtype:
        return self._folder.dtype(name)

    def tensor(self, name: str) -> Tensor:
        weight, layer = self._folder.tensor(name), name.removesuffix(".weight")
        known = layer in self._adaptation.numbers and layer != name
        return self._adaptation.merged(layer, weight) if known else weight


def merge_adapter(
    model: Path, adapter: Path, output: Path, progress: Callable[[int], None] = lambda done: None
) -> Adaptation:
    """Write the model folder `output`, that of `model` with the adapter in it; returns the adapter.

    Masks of the folder are left out, as entries outside of them may have been trained. Raises ValueError where one of
    the two is not whole, or the adapter was trained on another model.
    """
    folder, adaptation = ModelFolder(model), read_adapter(adapter)
    if adaptation.digest != folder_digest(folder):
        raise ConfigError(
            f"--adapter: {adapter} was trained on other weights than those of {model}; must be of a run whose "
            "train.init_from is that folder"
        )
    if strange := sorted(layer for layer in adaptation.numbers if f"{layer}.weight" not in folder.names):
        raise CheckpointError(f"{adapter}: {model} has no layer {strange[0]}")
    source = open_source(model)
    facts = {**source.facts, "adapter": adaptation.method}
    config, merged = portable_config(source.config, source.files), _Merged(folder, adaptation)
    write_weights(merged, config, output, facts=facts, files=source.files, progress=progress)
    return adaptation
