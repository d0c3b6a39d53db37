"""The universal form of a checkpoint: one file per parameter and kind, whole, for any layout to go on from.

    write_universal(folder)                        # without a process group, one parameter in memory at a time
    restore_state(engine, UniversalReader(folder))

    checkpoints/step-00000100/universal/
      manifest.json                   steps, model, train state, shapes, size and checksum of every file
      topology.safetensors            as in the checkpoint: it never depended on the layout
      zero/<parameter>/fp32.pt        master weight; exp_avg.pt, exp_avg_sq.pt, age.pt: moments; step.pt

``zero/`` has the form of DeepSpeed's universal checkpoints. It lies inside the checkpoint's folder, so it goes with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from safetensors.torch import load_file
from torch import Tensor

from megasparse.checkpoint.reader import WEIGHT, CheckpointReader
from megasparse.checkpoint.store import MANIFEST, TOPOLOGY, CheckpointError, read_manifest, sha256, write_synced
from megasparse.engine.safe_checkpoint import load_data
from megasparse.parallel.partition import Partition

UNIVERSAL = "universal"
FORMAT = 1
TOOL = "python tools/universal_checkpoint.py"


@dataclass(frozen=True)
class UniversalManifest:
    step: int
    optimizer_step: int
    model: dict[str, Any]
    """Section `model` of the configuration."""
    shapes: dict[str, list[int]]
    """Of the whole parameters, in the order of the model."""
    train_state: dict[str, Any]
    window_losses: list[float]
    """Each rank's sum of losses since the last logged step."""
    loss_scaler: dict[str, float]
    topology_sha256: str
    """Of the checkpoint that this was made from."""
    format: int = FORMAT
    files: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Size in bytes and SHA-256 by path."""


def write_universal(folder: Path, progress: Callable[[int], None] = lambda done: None) -> bool:
    """Write the universal form of the checkpoint in `folder`; False where a good one is there already.

    progress: called after each parameter with the bytes of weights that are done. Raises CheckpointError where the
    checkpoint is damaged or the disk too full.
    """
    if has_universal(folder):
        return False
    reader = CheckpointReader(folder)
    final, partial = folder / UNIVERSAL, folder / f"partial-{UNIVERSAL}"
    for leftover in (partial, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    _check_space(reader)
    partial.mkdir()
    shutil.copyfile(folder / TOPOLOGY, partial / TOPOLOGY)
    done = 0
    for name, partition in reader.layout.parameters.items():
        _write_parameter(reader, name, partial / "zero" / name)
        done += 4 * prod(partition.shape)
        progress(done)
    write_synced(partial / MANIFEST, json.dumps(asdict(_describe(reader, partial)), indent=1))
    os.replace(partial, final)
    return True


def verify_universal(folder: Path, progress: Callable[[int], None] = lambda done: None) -> None:
    """Raise CheckpointError unless every file has its checksum and every tensor equals the checkpoint's."""
    universal, reader = UniversalReader(folder), CheckpointReader(folder)
    universal.check_files()
    done = 0
    for name, partition in reader.layout.parameters.items():
        if universal.kinds(name) != reader.kinds(name):
            raise CheckpointError(f"{universal.folder}: {name} has {universal.kinds(name)}, not {reader.kinds(name)}")
        for kind in reader.kinds(name):
            if reader.copies_differ(name, kind):
                raise CheckpointError(f"checkpoint {folder}: tensor-parallel ranks hold different {kind} of {name}")
            if not torch.equal(universal.tensor(name, kind), reader.tensor(name, kind)):
                raise CheckpointError(f"{universal.folder}: {kind} of {name} differs from the checkpoint's")
        done += 4 * prod(partition.shape)
        progress(done)


def has_universal(folder: Path) -> bool:
    """Whether there is a universal form with all its files, made from this very checkpoint."""
    try:
        UniversalReader(folder)
    except CheckpointError:
        return False
    return True


def tool_command(folder: Path) -> str:
    """The command that makes the universal form of the checkpoint in `folder`."""
    return f"{TOOL} --run {folder.parents[1]} --step {int(folder.name.rpartition('-')[2])}"


class UniversalReader:
    """The universal form of the checkpoint in `folder`; what ``restore_state`` takes its tensors from.

    Raises CheckpointError where it is missing, incomplete or of another checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._command = folder / UNIVERSAL, tool_command(folder)
        self.manifest = self._read_manifest()
        for name, (size, _) in self.manifest.files.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                self._fail(f"{name} is missing" if found is None else f"{name} has {found} bytes instead of {size}")
        checkpoint = read_manifest(folder)
        if (self.manifest.step, self.manifest.topology_sha256) != (checkpoint.step, checkpoint.topology_sha256):
            self._fail("it was made from another checkpoint")
        self.step = self.manifest.optimizer_step
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.shapes.items()}

    def kinds(self, name: str) -> list[str]:
        kinds = (WEIGHT, "exp_avg", "exp_avg_sq", "age")
        return [kind for kind in kinds if _tensor_file(name, kind) in self.manifest.files]

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole tensor, mapped from its file."""
        try:
            tensor = load_data(self.folder / _tensor_file(name, kind), mmap=True)["param"]
        except (ValueError, KeyError, TypeError) as error:
            self._fail(f"{_tensor_file(name, kind)} is not readable: {error}")
        if tuple(tensor.shape) != self.shapes[name]:
            self._fail(f"{_tensor_file(name, kind)} has shape {tuple(tensor.shape)} instead of {self.shapes[name]}")
        return tensor

    def topology(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / TOPOLOGY)
        except Exception as error:
            self._fail(f"{TOPOLOGY} is not readable: {error}")

    def loss_scaler(self) -> dict[str, float]:
        return self.manifest.loss_scaler

    def check_files(self, number: int = 0, readers: int = 1) -> None:
        """Raise CheckpointError unless the files have their checksums; one of several readers checks its share."""
        for name in sorted(self.manifest.files)[number::readers]:
            if sha256(self.folder / name) != self.manifest.files[name][1]:
                self._fail(f"{name} does not have the checksum of the manifest")

    def _read_manifest(self) -> UniversalManifest:
        try:
            manifest = UniversalManifest(**json.loads((self.folder / MANIFEST).read_text()))
            for name, (size, checksum) in manifest.files.items():
                assert isinstance(name, str) and isinstance(size, int) and isinstance(checksum, str), name
        except OSError:
            self._fail("it is not there")
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            self._fail(f"{MANIFEST} is not readable: {error}")
        if manifest.format != FORMAT:
            self._fail(f"format {manifest.format}; legal values: {FORMAT}")
        return manifest

    def _fail(self, reason: str) -> None:
        raise CheckpointError(f"universal form {self.folder}: {reason}; make it with: {self._command}") from None


def _write_parameter(reader: CheckpointReader, name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    division = _division(name, reader.layout.parameters[name])
    for kind in reader.kinds(name):
        # No name for the tensor: it would outlive the making of the next one.
        torch.save({"param": reader.tensor(name, kind), **division}, folder / f"{kind}.pt")
    if reader.step > 0:
        torch.save(torch.tensor(float(reader.step)), folder / "step.pt")


def _division(name: str, partition: Partition) -> dict[str, Any]:
    """How DeepSpeed's own loader is to divide a parameter; ours asks the model instead."""
    if partition.dim is None:
        return {}
    if len(set(partition.divided_parts)) == 1:
        return {"cat_dim": partition.dim, "param_n_sub_params": len(partition.divided_parts)}
    shape = tuple(partition.divided_parts if at == partition.dim else n for at, n in enumerate(partition.shape))
    return {"sub_param_shape": SubparamShape(patterns=[name], shape=shape, partition_dim=partition.dim)}


def _describe(reader: CheckpointReader, partial: Path) -> UniversalManifest:
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    client = reader.client_state()
    return UniversalManifest(
        step=reader.manifest.step,
        optimizer_step=reader.step,
        model=reader.manifest.model,
        shapes={name: list(partition.shape) for name, partition in reader.layout.parameters.items()},
        train_state=client["train_state"],
        window_losses=client["window_losses"],
        loss_scaler=reader.loss_scaler(),
        topology_sha256=reader.manifest.topology_sha256,
        files={str(path.relative_to(partial)): (path.stat().st_size, sha256(path)) for path in paths},
    )


def _tensor_file(name: str, kind: str) -> str:
    return f"zero/{name}/{kind}.pt"


def _check_space(reader: CheckpointReader) -> None:
    numbers = sum(prod(partition.shape) for partition in reader.layout.parameters.values())
    needed, free = 14 * numbers, shutil.disk_usage(reader.folder).free
    if needed > free:
        raise CheckpointError(f"{reader.folder}: the universal form needs {needed} bytes, the disk has {free} free")
