"""The universal form of a checkpoint: one file per parameter and kind, whole, for any layout to go on from.

    write_universal(folder)                        # without a process group, one parameter in memory at a time
    restore_state(engine, UniversalReader(folder))
    write_universal_only(saved, run_folder)        # a checkpoint that is nothing else, from any saved state

    checkpoints/step-00000100/universal/
      manifest.json                   steps, model, train state, shapes, size and checksum of every file
      topology.safetensors            as in the checkpoint: it never depended on the layout
      zero/<parameter>/fp32.pt        master weight; exp_avg.pt, exp_avg_sq.pt, weight_steps.pt: moments; step.pt

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
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megasparse.checkpoint.reader import CheckpointReader
from megasparse.checkpoint.saved_state import ITEM_BYTES, KINDS, WEIGHT, RunFacts, SavedState
from megasparse.checkpoint.store import (
    CHECKPOINTS,
    MANIFEST,
    TOPOLOGY,
    CheckpointError,
    CheckpointStore,
    Manifest,
    read_manifest,
    sha256,
    size_problem,
)
from megasparse.engine.safe_checkpoint import load_data
from megasparse.utils.files import write_json

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
    _write_form(reader, folder / TOPOLOGY, partial, progress)
    os.replace(partial, final)
    return True


def write_universal_only(
    saved: SavedState, run_folder: Path, progress: Callable[[int], None] = lambda done: None
) -> Path:
    """Write a checkpoint that holds nothing but its universal form below `run_folder`; returns its folder."""
    facts, store = saved.facts, CheckpointStore(run_folder / CHECKPOINTS, keep=1)
    partial = store.folder / store.begin(facts.step)
    save_file({key: bits.contiguous() for key, bits in saved.topology().items()}, partial / TOPOLOGY)
    _write_form(saved, partial / TOPOLOGY, partial / UNIVERSAL, progress)
    return store.commit(Manifest(step=facts.step, world_size=0, zero_stage=0, model=facts.model))


def open_checkpoint(folder: Path) -> CheckpointReader | UniversalReader:
    """The state in a checkpoint folder, from DeepSpeed's files where they are there."""
    return UniversalReader(folder) if read_manifest(folder).is_universal_only else CheckpointReader(folder)


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
        checkpoint = read_manifest(folder)
        self.folder = folder / UNIVERSAL
        self._hint = "" if checkpoint.is_universal_only else f"; make it with: {tool_command(folder)}"
        self.manifest = self._read_manifest()
        for name, (size, _) in self.manifest.files.items():
            if problem := size_problem(self.folder / name, size):
                self._fail(f"{name} {problem}")
        if (self.manifest.step, self.manifest.topology_sha256) != (checkpoint.step, checkpoint.topology_sha256):
            self._fail("it was made from another checkpoint")
        self.step = self.manifest.optimizer_step
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.shapes.items()}

    def kinds(self, name: str) -> list[str]:
        return [kind for kind in KINDS if _tensor_file(name, kind) in self.manifest.files]

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole tensor, mapped from its file."""
        return self._content(name, kind)["param"]

    def division(self, name: str) -> dict[str, Any]:
        """How DeepSpeed's own loader is to divide a parameter."""
        return {key: value for key, value in self._content(name, WEIGHT).items() if key != "param"}

    @property
    def facts(self) -> RunFacts:
        manifest = self.manifest
        return RunFacts(manifest.step, manifest.model, manifest.train_state, manifest.window_losses)

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

    def _content(self, name: str, kind: str) -> dict[str, Any]:
        try:
            content = load_data(self.folder / _tensor_file(name, kind), mmap=True)
            shape = tuple(content["param"].shape)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._fail(f"{_tensor_file(name, kind)} is not readable: {error}")
        if shape != self.shapes[name]:
            self._fail(f"{_tensor_file(name, kind)} has shape {shape} instead of {self.shapes[name]}")
        return content

    def _read_manifest(self) -> UniversalManifest:
        try:
            manifest = UniversalManifest(**json.loads((self.folder / MANIFEST).read_text(encoding="utf-8")))
            for name, (size, checksum) in manifest.files.items():
                assert isinstance(name, str) and isinstance(size, int) and isinstance(checksum, str), name
        except OSError:
            self._fail("it is not there")
        except (ValueError, TypeError, AttributeError, AssertionError) as error:
            self._fail(f"{MANIFEST} is not readable: {error}")
        if manifest.format != FORMAT:
            self._fail(f"format {manifest.format}; must be {FORMAT}")
        return manifest

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"universal form {self.folder}: {reason}{self._hint}") from None


def _write_form(saved: SavedState, topology: Path, partial: Path, progress: Callable[[int], None]) -> None:
    """Write the universal form into `partial`, a folder that is not there yet, with a copy of the topology's file."""
    _check_space(saved, partial.parent)
    partial.mkdir()
    shutil.copyfile(topology, partial / TOPOLOGY)
    done = 0
    for name, shape in saved.shapes.items():
        _write_parameter(saved, name, partial / "zero" / name)
        done += 4 * prod(shape)
        progress(done)
    write_json(partial / MANIFEST, asdict(_describe(saved, partial)))


def _write_parameter(saved: SavedState, name: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    division = saved.division(name)
    for kind in saved.kinds(name):
        # No name for the tensor: it would outlive the making of the next one.
        torch.save({"param": saved.tensor(name, kind), **division}, folder / f"{kind}.pt")
    if saved.step > 0:
        torch.save(torch.tensor(float(saved.step)), folder / "step.pt")


def _describe(saved: SavedState, partial: Path) -> UniversalManifest:
    paths, facts = sorted(path for path in partial.rglob("*") if path.is_file()), saved.facts
    return UniversalManifest(
        step=facts.step,
        optimizer_step=saved.step,
        model=facts.model,
        shapes={name: list(shape) for name, shape in saved.shapes.items()},
        train_state=facts.train_state,
        window_losses=facts.window_losses,
        loss_scaler=dict(saved.loss_scaler()),
        topology_sha256=sha256(partial / TOPOLOGY),
        files={str(path.relative_to(partial)): (path.stat().st_size, sha256(path)) for path in paths},
    )


def _tensor_file(name: str, kind: str) -> str:
    return f"zero/{name}/{kind}.pt"


def _check_space(saved: SavedState, folder: Path) -> None:
    needed = sum(
        ITEM_BYTES.get(kind, 4) * prod(shape) for name, shape in saved.shapes.items() for kind in saved.kinds(name)
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: the universal form needs {needed} bytes, the disk has {free} free")
