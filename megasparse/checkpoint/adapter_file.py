"""An adapter on disk: which units of which matrices were trained, and what is added to them; one safetensors file.

    write_adapter(path, Adaptation("smt", 64, digest, numbers, values, {}))
    adaptation = read_adapter(path)
    merged = adaptation.merged(name, weight)

Tensors: `<layer>.numbers` int32 [n], `<layer>.values` float32 [n, unit, unit], and `<layer>.base` float32 [out, in]
where the weights below are not those of the model folder. With a percent of a small model it is a few MB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from megasparse.checkpoint.model_folder import CHECKSUMS, ModelFolder
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles, read_json
from megasparse.layers.delta import unit_entries
from megasparse.utils.files import write_at_once

ADAPTER = "adapter.safetensors"
FORMAT = "1"
HEADER = "megasparse.adapter"


@dataclass(frozen=True)
class Adaptation:
    """What a run has trained of a frozen model."""

    method: str
    unit: int
    """Side of the units."""
    digest: str
    """Of the model folder below, see ``folder_digest``."""
    numbers: Mapping[str, Tensor]
    """By layer, int64 [n]: flat numbers of its units."""
    values: Mapping[str, Tensor]
    """By layer, float32 [n, unit, unit]: what is added to the weight."""
    base: Mapping[str, Tensor]
    """By layer, float32 [out, in]: weights that take the place of the folder's; empty where these are the base."""

    def merged(self, layer: str, weight: Tensor) -> Tensor:
        """The weight of a layer [out, in] with the adapter in it: each sum is rounded once, to its dtype."""
        base = self.base.get(layer, weight)
        merged = base.to(weight.dtype, copy=True).contiguous()
        if layer in self.numbers:
            rows, columns = weight.shape
            at, inside = unit_entries(self.numbers[layer], self.unit, (rows, columns))
            total = base.reshape(-1)[at[inside]].to(torch.float32) + self.values[layer][inside]
            merged.view(-1)[at[inside]] = total.to(weight.dtype)
        return merged


def folder_digest(folder: ModelFolder) -> str:
    """Of all weights of a model folder, by the checksums that lie beside them."""
    files = read_json(folder.folder / CHECKSUMS)["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_adapter(path: Path, adaptation: Adaptation) -> None:
    """The file appears when it is whole."""
    tensors = {f"{name}.numbers": numbers.to(torch.int32) for name, numbers in adaptation.numbers.items()}
    tensors |= {f"{name}.values": values.to(torch.float32) for name, values in adaptation.values.items()}
    tensors |= {f"{name}.base": base.to(torch.float32) for name, base in adaptation.base.items()}
    facts = {"method": adaptation.method, "unit": adaptation.unit, "digest": adaptation.digest}
    metadata = {HEADER: FORMAT, "facts": json.dumps(facts)}
    write_at_once(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata))


def read_adapter(path: Path) -> Adaptation:
    """Raises CheckpointError for a file that is none, or is damaged."""
    files = TensorFiles(path.parent, path.name.removesuffix(".safetensors"))
    if files.metadata.get(HEADER) != FORMAT:
        raise CheckpointError(f"{path}: no adapter; must be the {ADAPTER} of a run with section smt or spiel")
    facts = json.loads(files.metadata["facts"])
    kinds: dict[str, dict[str, Tensor]] = {"numbers": {}, "values": {}, "base": {}}
    for name in files.names:
        layer, _, kind = name.rpartition(".")
        if kind not in kinds:
            raise CheckpointError(f"{path}: holds {name!r}, which is no part of an adapter")
        kinds[kind][layer] = files.tensor(name).clone()
    unit, numbers = int(facts["unit"]), {name: tensor.long() for name, tensor in kinds["numbers"].items()}
    for name, tensor in numbers.items():
        values = kinds["values"].get(name)
        if values is None or tuple(values.shape) != (tensor.numel(), unit, unit):
            raise CheckpointError(f"{path}: numbers and values of layer {name} do not fit")
    return Adaptation(str(facts["method"]), unit, str(facts["digest"]), numbers, kinds["values"], kinds["base"])
