"""A checkpoint as a saved state: whole tensors, or the fragments that a rank of any layout needs.

    saved = Checkpoint(folder)
    weight = saved.tensor("layers.0.mlp.up.weight", "fp32")
    mine = saved.fragment("layers.0.mlp.up.weight", "exp_avg", shard_spec, tensor_parallel_rank, start, numel)

Only what is asked for is read, and everything that is read is compared with its checksum.
"""

from __future__ import annotations

from bisect import bisect_right
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megasparse.checkpoint.index import read_index
from megasparse.checkpoint.order import FragmentOrder, Run
from megasparse.checkpoint.packed import PackedMatrix, ReadSlots, blocks_of_strips, whole_numbers
from megasparse.checkpoint.rank_file import RankFile
from megasparse.checkpoint.saved_state import KINDS, LIVE, RunFacts, layers_of, parameter_name
from megasparse.checkpoint.store import CheckpointError
from megasparse.parallel import ShardSpec
from megasparse.sparsity.slots import EMPTY
from megasparse.sparsity.topology import unpack_bits

METHOD, RANDOM, SLOTS = "method", "random", "slots"
"""Beginnings of the names of tensors that belong to no parameter: `method/<name>/<key>`, `random/cpu`,
`slots/<parameter>`."""


class _Place(NamedTuple):
    """Entries [start, end) of a parameter lie in a file from `offset` on."""

    start: int
    end: int
    file: str
    offset: int


class Checkpoint:
    """One folder. Raises CheckpointError where it is no whole checkpoint, and on reading where bytes were changed.

    Attributes:
        shapes: of the whole parameters by name, in the order of the model.
        step: updates of the optimizer; 0: there are no moments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self.step = self.index.optimizer_step
        self.shapes = {name: parameter.matrix_shape for name, parameter in self.index.parameters.items()}
        self._packed: dict[str, PackedMatrix] = {}
        self._files: dict[str, RankFile] = {}
        self._places: dict[str, list[_Place]] = {}
        for file, saved in self.index.files.items():
            for key, runs in saved.runs.items():
                offset = 0
                for run in runs:
                    self._places.setdefault(key, []).append(_Place(run.start, run.end, file, offset))
                    offset += run.numel
        for places in self._places.values():
            places.sort()
        self._check_complete()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def facts(self) -> RunFacts:
        index = self.index
        return RunFacts(index.step, index.model, index.train_state, index.window_losses)

    @property
    def bytes_read(self) -> int:
        """Of the data of tensors, so far, since it was opened."""
        return sum(file.bytes_read for file in self._files.values())

    def kinds(self, name: str) -> list[str]:
        """`fp32` and the moments that are kept of a parameter."""
        return [kind for kind in KINDS if f"{kind}/{name}" in self._places]

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor:
        """Entries [start, start + numel) of the shard of a tensor-parallel rank, flattened: float32, per-weight steps
        int16."""
        parameter = self.index.parameters[name]
        assert spec.shape == self.shapes[name], f"{name}: {spec.shape} is not {self.shapes[name]}"
        if parameter.grid is not None:
            return self._packed_matrix(name).fragment(spec, rank, start, numel, self._reader(name, kind))
        order = FragmentOrder(spec, rank, start, numel, parameter.bands)
        return order.assemble([self._run(f"{kind}/{name}", run) for run in order.runs])

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole parameter or moment."""
        shape = self.shapes[name]
        spec = ShardSpec(shape, 1 if self.index.parameters[name].bands > 1 else None)
        return self.fragment(name, kind, spec, 0, 0, prod(shape)).view(shape)

    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
        """Blocks of the shard of a tensor-parallel rank by their numbers (int64 [n], -1: zeros) on its part of the
        grid: [n, block_size, block_size]."""
        whole = whole_numbers(grid, rank, numbers)
        if self.index.parameters[name].grid is not None:
            return self._packed_matrix(name).blocks(whole, self._reader(name, kind))
        shape, block_size = self.shapes[name], self.shapes[name][1] // grid.shape[1]
        spec = ShardSpec(shape, 1 if self.index.parameters[name].bands > 1 else None)
        strip = block_size * shape[1]
        return blocks_of_strips(
            whole, grid.shape[1], block_size, lambda row: self.fragment(name, kind, spec, 0, row * strip, strip)
        )

    def slots(self, name: str) -> Tensor | None:
        """The block of the whole grid in each slot of a packed parameter, int32, -1: none. None: it is not packed."""
        return None if self.index.parameters[name].grid is None else self._packed_matrix(name).slots

    def topology(self) -> dict[str, Tensor]:
        return self.method_state("topology")

    def method_state(self, method: str) -> dict[str, Tensor]:
        """What a training method saved; empty where it saved nothing."""
        prefix = f"{METHOD}/{method}/"
        found = {}
        for file in self.index.files:
            opened = self._open(file)
            for name, spec in opened.specs.items():
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = opened.read(name).view(spec.shape)
            if found:
                break
        return found

    def check_slots(self) -> None:
        """Raise CheckpointError where a packed parameter is not made of the active blocks of its layer: what is missing
        would be read as zeros."""
        topology = self.topology()
        for layer in layers_of(topology) if any(p.grid is not None for p in self.index.parameters.values()) else ():
            name = parameter_name(layer, self.shapes)
            slots, grid = self.slots(name), self.index.parameters[name].grid
            if slots is None or grid is None:
                continue
            held = slots[slots != EMPTY].sort().values
            active = unpack_bits(topology[f"{LIVE}{layer}"], prod(grid)).nonzero().view(-1)
            if not torch.equal(held.long(), active):
                raise CheckpointError(f"checkpoint {self.folder}: {name} does not hold the active blocks of {layer}")

    def random_state(self, rank: int) -> Tensor | None:
        """That of torch on the host, of a rank of the run that was saved; None: there was no such rank."""
        file = f"rank-{rank:05d}.safetensors"
        if file not in self.index.files or f"{RANDOM}/cpu" not in self._open(file).specs:
            return None
        return self._open(file).read(f"{RANDOM}/cpu")

    def loss_scaler(self) -> dict[str, float]:
        return self.index.loss_scaler

    def check_all(self) -> None:
        """Read everything. Raises CheckpointError at the first byte that was changed."""
        for file in self.index.files:
            self.check_file(file)

    def check_file(self, file: str) -> None:
        """Read all of one file. Raises CheckpointError at the first byte that was changed."""
        opened = self._open(file)
        for name in opened.specs:
            opened.read(name)

    def _packed_matrix(self, name: str) -> PackedMatrix:
        if name not in self._packed:
            file, parameter = next(iter(self.index.files)), self.index.parameters[name]
            key, opened = f"{SLOTS}/{name}", self._open(file)
            if key not in opened.specs or opened.specs[key].shape != parameter.shape[:1]:
                raise CheckpointError(f"checkpoint {self.folder}: {file} does not say which blocks of {name} it holds")
            assert parameter.grid is not None
            self._packed[name] = PackedMatrix(parameter.grid, parameter.shape[1], opened.read(key))
        return self._packed[name]

    def _reader(self, name: str, kind: str) -> ReadSlots:
        """Reads whole slots [first, first + count) of a packed parameter, flat."""
        size = prod(self.index.parameters[name].shape[1:])
        return lambda first, count: self._run(f"{kind}/{name}", Run(first * size, count * size))

    def _run(self, key: str, run: Run) -> Tensor:
        places = self._places[key]
        at = bisect_right(places, run.start, key=lambda place: place.start) - 1
        found, start = [], run.start
        while start < run.end:
            place = places[at]
            end = min(run.end, place.end)
            found.append(self._open(place.file).read(key, place.offset + start - place.start, end - start))
            start, at = end, at + 1
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _open(self, file: str) -> RankFile:
        if file not in self._files:
            self._files[file] = RankFile(self.folder / file, self.index.files[file].part)
        return self._files[file]

    def _check_complete(self) -> None:
        """Every entry of every kind is there exactly once."""
        for key, places in self._places.items():
            name = key.partition("/")[2]
            if name not in self.shapes:
                raise CheckpointError(f"checkpoint {self.folder}: its index lists {key}, which is no parameter")
            edges = [0, *(place.end for place in places)]
            starts = [*(place.start for place in places), prod(self.index.parameters[name].shape)]
            if edges != starts:
                raise CheckpointError(f"checkpoint {self.folder}: its files do not hold every entry of {key} once")
        absent = [name for name in self.shapes if prod(self.shapes[name]) and not self.kinds(name)]
        if absent:
            raise CheckpointError(f"checkpoint {self.folder}: its files hold nothing of {absent[0]}")


def is_good(folder: Path) -> bool:
    """Whether index and sizes of files are those of a whole checkpoint."""
    try:
        read_index(folder)
    except CheckpointError:
        return False
    return True


def damage(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, as far as index and sizes of files tell; None: it is one."""
    try:
        read_index(folder)
    except CheckpointError as error:
        return str(error)
    return None
