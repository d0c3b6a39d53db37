"""Quantised weights of a model folder: how they lie in its files, and how they become numbers again.

FOLDER/quantization.json        what is quantised, and how
layers.0.mlp.up.weight          int8 [out, in], or 3 and 4 bits packed, uint8 [out, bytes]
layers.0.mlp.up.weight_scales   float32 [out], or [out, in / group]

files = QuantizedFiles(folder, quantization)
files.tensor("layers.0.mlp.up.weight")          # float32, as everywhere else
files.matrix("layers.0.mlp.up.weight")          # levels and scales, for kernels
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.tensor_files import TensorFiles, TensorSpec, read_json
from megasparse.config.loader import ConfigError, check_values
from megasparse.config.section import PositiveInt, Section
from megasparse.kernels.quantized import QuantizedMatrix, pack_levels, packed_width, unpack_levels
from megasparse.utils.files import write_json

QUANTIZATION = "quantization.json"
SCALES = "_scales"


class Quantization(Section):
    """What `quantization.json` says."""

    format: Literal[1] = 1
    bits: Literal[3, 4, 8]
    group: PositiveInt | None = None
    """Neighbouring inputs that share a scale; None: all inputs of an output."""
    activations: Literal["int8", "float"]
    """int8: quantised by token while a layer runs."""
    rounding: Literal["nearest", "discquant"] = "nearest"
    smoothing: float | None = None
    """SmoothQuant's exponent; its scales are in the weights and norms already."""
    layers: dict[str, tuple[PositiveInt, PositiveInt]]
    """Outputs and inputs of the quantised linear layers, by name."""

    @property
    def parameters(self) -> dict[str, tuple[int, int]]:
        """Shapes by parameter."""
        return {f"{layer}.weight": shape for layer, shape in self.layers.items()}

    def stored(self, name: str) -> dict[str, TensorSpec]:
        """What lies in the files for a quantised parameter, by key."""
        rows, columns = self.parameters[name]
        levels = TensorSpec((rows, columns), torch.int8)
        if self.bits < 8:
            levels = TensorSpec((rows, packed_width(columns, self.bits)), torch.uint8)
        scales = (rows,) if self.group is None else (rows, columns // self.group)
        return {name: levels, f"{name}{SCALES}": TensorSpec(scales, torch.float32)}

    def stored_specs(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The same for all parameters of a model, which have these specifications otherwise."""
        found: dict[str, TensorSpec] = {}
        for name, spec in specs.items():
            found |= self.stored(name) if name in self.parameters else {name: spec}
        return found

    def tensors(self, name: str, matrix: QuantizedMatrix) -> dict[str, Tensor]:
        """What is written for a quantised parameter, in the order of ``stored``."""
        levels = matrix.values if self.bits == 8 else pack_levels(matrix.values, self.bits)
        return {name: levels.cpu().contiguous(), f"{name}{SCALES}": matrix.scales.cpu().contiguous()}


def write_quantization(quantization: Quantization, folder: Path) -> None:
    write_json(folder / QUANTIZATION, quantization.model_dump(mode="json"))


def read_quantization(folder: Path) -> Quantization | None:
    """None where the folder's weights are ordinary ones. Raises CheckpointError for a file that says something else."""
    path = folder / QUANTIZATION
    if not path.is_file():
        return None
    values: dict[str, Any] = read_json(path)
    try:
        return check_values(Quantization, values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


class QuantizedFiles(TensorFiles):
    """The tensors of a folder with quantised ones, by the names and shapes of the model; those in float32."""

    def __init__(self, folder: Path, quantization: Quantization) -> None:
        super().__init__(folder)
        self.quantization = quantization
        self._shapes = quantization.parameters
        for name in self._shapes:
            for key, spec in quantization.stored(name).items():
                if self.specs.get(key) != spec:
                    raise CheckpointError(
                        f"{folder}: {key} is {self.specs.get(key)}; must be {spec}, as {QUANTIZATION} says"
                    )

    @property
    def names(self) -> list[str]:
        scales = {f"{name}{SCALES}" for name in self._shapes}
        return [name for name in self.specs if name not in scales]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name) or super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self._shapes else super().dtype(name)

    def tensor(self, name: str) -> Tensor:
        return self.matrix(name).dequantized() if name in self._shapes else super().tensor(name)

    def matrix(self, name: str) -> QuantizedMatrix:
        """A quantised parameter as it is; 8 bits are mapped from their file."""
        bits, (_, columns) = self.quantization.bits, self._shapes[name]
        levels, scales = super().tensor(name), super().tensor(f"{name}{SCALES}")
        return QuantizedMatrix(levels if bits == 8 else unpack_levels(levels, bits, columns), scales)
