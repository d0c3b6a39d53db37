"""What a pruning has done so far, on disk: a process that was killed goes on at the block where it was.

    work = WorkFolder(output, fingerprint)
    work.check()                                   # on every rank, before there is a process group
    with work:                                     # on rank 0; it goes when all is done
        ...

The folder lies beside the output: `.<output>.pruning`. It holds `state.json`, what each block reads from the blocks
before it, and each pruned layer. A block counts as done when its layers and the inputs of the next one are whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from megasparse.checkpoint.tensor_files import read_json, save_tensors
from megasparse.config.loader import ConfigError
from megasparse.utils.files import failures_named, write_json

FORMAT = 1


@dataclass(frozen=True)
class LayerRecord:
    """What is known of a pruned layer, apart from its weight."""

    active: Tensor
    """Packed bits of its units."""
    num_active: int
    error: float
    """Relative error of its outputs on the calibration tokens; NaN where it was not computed."""


class WorkFolder:
    """fingerprint: plain values that say what is computed; those of an earlier start must be the same."""

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        self.path = output.with_name(f".{output.name}.pruning")
        self.fingerprint = dict(fingerprint)

    def check(self) -> None:
        """Raise ConfigError where the folder is of a pruning with other settings."""
        if not self._state_file.is_file():
            return
        found = read_json(self._state_file)
        theirs = found.get("fingerprint", {}) if found.get("format") == FORMAT else {}
        odd = sorted(key for key in {*theirs, *self.fingerprint} if theirs.get(key) != self.fingerprint.get(key))
        if odd:
            raise ConfigError(
                f"--output: {self.path} holds an unfinished pruning with another {odd[0].replace('_', ' ')}: "
                f"{theirs.get(odd[0])}, here {self.fingerprint.get(odd[0])}; must be the same to go on, or --restart "
                "to begin anew"
            )

    def begin(self, restart: bool) -> None:
        """Make the folder, or keep what it holds; on one rank."""
        if restart:
            self.remove()
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._state_file.is_file():
            self.save(0)
        done = self.blocks_done
        for path in self.path.glob("inputs-*.bin"):
            if path != self.inputs_file(done):
                path.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def blocks_done(self) -> int:
        return int(read_json(self._state_file)["blocks_done"])

    @property
    def counts(self) -> dict[str, int] | None:
        """Units to keep by layer, where they were decided already."""
        return read_json(self._state_file).get("counts")

    def save(self, blocks_done: int, counts: Mapping[str, int] | None = None) -> None:
        values = {"format": FORMAT, "blocks_done": blocks_done, "counts": counts, "fingerprint": self.fingerprint}
        write_json(self._state_file, values)

    def inputs_file(self, block: int) -> Path:
        return self.path / f"inputs-{block}.bin"

    def save_layer(self, layer: str, weight: Tensor, record: LayerRecord) -> None:
        """weight: in the dtype that it will have in the model folder."""
        path = self._layer_file(layer)
        partial = path.with_suffix(".part")
        error = torch.tensor(record.error, dtype=torch.float64)
        count = torch.tensor(record.num_active, dtype=torch.int64)
        save_tensors({"weight": weight, "active": record.active, "count": count, "error": error}, partial)
        os.replace(partial, path)

    def weight(self, layer: str) -> Tensor:
        """Mapped from its file: release it before the next one."""
        with safe_open(self._layer_file(layer), framework="pt") as file:
            return file.get_tensor("weight")

    def record(self, layer: str) -> LayerRecord:
        with safe_open(self._layer_file(layer), framework="pt") as file:
            active, count, error = (file.get_tensor(name).clone() for name in ("active", "count", "error"))
        return LayerRecord(active, int(count), float(error))

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    def _layer_file(self, layer: str) -> Path:
        return self.path / f"{layer}.safetensors"


class ActivationFile:
    """Float32 [samples, T, C] on disk, read and written sample by sample, by several processes at different places."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self._sample_bytes = 4 * shape[1] * shape[2]

    def create(self) -> None:
        """Make the file, of zeros; on one process, before the others write."""
        with failures_named(self.path), self.path.open("wb") as file:
            file.truncate(self.shape[0] * self._sample_bytes)

    def read(self, sample: int) -> Tensor:
        """[1, T, C]."""
        values = np.fromfile(self.path, np.float32, self._sample_bytes // 4, offset=sample * self._sample_bytes)
        return torch.from_numpy(values).view(1, *self.shape[1:])

    def write(self, sample: int, x_1TC: Tensor) -> None:
        with failures_named(self.path), self.path.open("r+b") as file:
            file.seek(sample * self._sample_bytes)
            file.write(x_1TC.float().cpu().contiguous().numpy().data)
