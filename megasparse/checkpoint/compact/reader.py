"""Reads compact folders: a saved state like any other, and what was packed, unpacked again.

saved = CompactReader(Path("small"))
unpack_run(saved, Path("runs/again"))       # a run that goes on with train.resume=auto
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megasparse.checkpoint.compact.encoding import decode_places, with_active_values
from megasparse.checkpoint.compact.manifest import COMPANIONS, CONFIG, Stored, read_manifest, tensor_file
from megasparse.checkpoint.compact.writer import EVER_BITS, INDEX
from megasparse.checkpoint.saved_state import EVER, KINDS, LIVE, RunFacts, moved
from megasparse.checkpoint.store import CheckpointError, sha256, size_problem
from megasparse.checkpoint.writing import write_checkpoint
from megasparse.config.loader import load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.sparsity.topology import pack_bits
from megasparse.utils.folders import new_folder


class CompactReader:
    """A compact folder. Raises CheckpointError where it is damaged or of another version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        for name, (size, _) in self.manifest.files.items():
            if problem := size_problem(folder / name, size):
                self._fail(f"{name} {problem}")
        absent = [name for name in self._parameters if tensor_file(name) not in self.manifest.files]
        if absent:
            self._fail(f"its manifest counts no file of {absent[0]}")
        self.step = self.manifest.optimizer_step
        self.shapes = {name: tuple(stored.shape) for name, stored in self._parameters.items()}

    @cached_property
    def config(self) -> RunConfig:
        """Of the run that was packed."""
        return load_config([self.folder / CONFIG])

    @property
    def companions(self) -> dict[str, Path]:
        """Files of the tokenizer, by name."""
        return {
            Path(name).name: self.folder / name for name in self.manifest.files if Path(name).parts[0] == COMPANIONS
        }

    @property
    def facts(self) -> RunFacts:
        manifest = self.manifest
        return RunFacts(manifest.step, manifest.model, manifest.train_state, manifest.window_losses)

    def kinds(self, name: str) -> list[str]:
        return [kind for kind in KINDS if kind in self._parameters[name].kinds]

    def tensor(self, name: str, kind: str) -> Tensor:
        stored = self._parameters[name]
        values, fill = self._read(name, kind), stored.fill(kind)
        if values.dtype != stored.dtype(kind):
            self._fail(f"{tensor_file(name)} holds {kind} as {values.dtype}, not {stored.dtype(kind)}")
        if stored.sparse is not None and fill is not None:
            if values.numel() != stored.active * stored.block_size**2:
                self._fail(f"{tensor_file(name)} holds {values.numel()} values of {stored.active} active units")
            return with_active_values(values, self._mask(name), stored.block_size, fill)
        if tuple(values.shape) != self.shapes[name]:
            self._fail(f"{tensor_file(name)} has {kind} of shape {tuple(values.shape)}, not {self.shapes[name]}")
        return values

    def topology(self) -> dict[str, Tensor]:
        """Where only weights were packed, what is active now is all that is known to have been active."""
        found = {}
        for name, stored in self._parameters.items():
            if stored.layer is not None:
                active = pack_bits(self._mask(name))
                found[f"{LIVE}{stored.layer}"] = active
                found[f"{EVER}{stored.layer}"] = self._ever(name, active)
        return found

    def _ever(self, name: str, active: Tensor) -> Tensor:
        # A copy: safetensors refuses tensors that share memory.
        return active.clone() if self.manifest.weights_only else self._read(name, EVER_BITS)

    def loss_scaler(self) -> dict[str, float]:
        return self.manifest.loss_scaler

    def check_files(self) -> None:
        """Raise CheckpointError unless every file has its checksum."""
        for name, (_, checksum) in sorted(self.manifest.files.items()):
            if sha256(self.folder / name) != checksum:
                self._fail(f"{name} does not have the checksum of the manifest")

    @property
    def _parameters(self) -> dict[str, Stored]:
        return self.manifest.parameters

    def _mask(self, name: str) -> Tensor:
        stored = self._parameters[name]
        assert stored.sparse is not None, name
        try:
            return decode_places(self._read(name, INDEX), stored.index, stored.sparse.grid, stored.active)
        except ValueError as error:
            self._fail(f"{tensor_file(name)}: {error}")

    def _read(self, name: str, key: str) -> Tensor:
        try:
            with safe_open(self.folder / tensor_file(name), framework="pt") as file:
                return file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            self._fail(f"{tensor_file(name)} is not readable: {error}")

    def _fail(self, reason: str) -> None:
        raise CheckpointError(f"compact folder {self.folder}: {reason}") from None


def unpack_run(saved: CompactReader, output: Path, progress: Callable[[int], None] = lambda done: None) -> Path:
    """Make a run folder from which the run goes on; returns its checkpoint.

    Its configuration says where it lies now, and no longer where the run was to stop. Raises CheckpointError, and
    leaves nothing, where `output` is there already or a file is damaged.
    """
    if saved.manifest.weights_only:
        raise CheckpointError(f"compact folder {saved.folder}: it holds weights only, so no run can go on from it")
    saved.check_files()
    with new_folder(output) as folder:
        save_config(moved(saved.config, output), folder / "config.yaml")
        for name, path in saved.companions.items():
            shutil.copyfile(path, folder / name)
        checkpoint = write_checkpoint(saved, folder, progress).relative_to(folder)
    return output / checkpoint
