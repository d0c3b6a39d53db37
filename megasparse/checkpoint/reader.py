"""A checkpoint as a saved state: whole tensors, or the fragments that a rank of any layout needs.

    saved = Checkpoint(folder)
    weight = saved.tensor("layers.0.mlp.up.weight", "fp32")
    mine = saved.fragment("layers.0.mlp.up.weight", "exp_avg", shard_spec, tensor_parallel_rank, start, numel)

Only what is asked for is read, and everything that is read is compared with its checksum.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megasparse.checkpoint.index import SavedFile, read_index
from megasparse.checkpoint.joined import is_joined, ranks_of, read_joined
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


class _Listed:
    """Files that an index lists, and where in them each entry lies. Offsets are of the files of ranks."""

    def __init__(self, files: Mapping[str, SavedFile]) -> None:
        self.files, self.places = files, dict[str, list[_Place]]()
        for file, saved in files.items():
            for key, runs in saved.runs.items():
                offset = 0
                for run in runs:
                    self.places.setdefault(key, []).append(_Place(run.start, run.end, file, offset))
                    offset += run.numel
        for places in self.places.values():
            places.sort()


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
        self._opened: dict[str, RankFile] = {}
        self._top = _Listed(self.index.files)
        self._joined: dict[str, _Listed] = {}
        self._check_complete()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    @property
    def facts(self) -> RunFacts:
        index = self.index
        return RunFacts(index.step, index.model, index.train_state, index.window_losses)

    @property
    def bytes_read(self) -> int:
        """Of the data of tensors, so far, since it was opened."""
        return sum(file.bytes_read for file in self._opened.values())

    def kinds(self, name: str) -> list[str]:
        """`fp32` and the moments that are kept of a parameter."""
        return [kind for kind in KINDS if f"{kind}/{name}" in self._top.places]

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
        for file in self.files():
            opened = self._open(*file)
            for name, spec in opened.specs.items():
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = opened.read(name).view(spec.shape)
            if found:
                break
        return found

    def check_only_topology(self) -> None:
        """Raise CheckpointError where a method besides the topology has saved something: who reads whole parameters and
        masks alone would lose it, and the run could not go on."""
        names = (name for file in self.files() for name in self._open(*file).specs)
        found = {name.split("/")[1] for name in names if name.startswith(f"{METHOD}/")} - {"topology"}
        if found:
            raise CheckpointError(
                f"{self.folder}: holds the state of {', '.join(sorted(found))}, which would be lost; must be weights "
                "alone (--weights-only), or a checkpoint without"
            )

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
        return self.own_tensor(rank, f"{RANDOM}/cpu")

    def own_tensor(self, rank: int, name: str) -> Tensor | None:
        """What a rank of the run that was saved has kept of its own; None: there was no such rank, or nothing."""
        listed = self._top
        while True:
            file = next((file for file in listed.files if rank in ranks_of(file)), None)
            if file is None:
                return None
            if not is_joined(file):
                opened = self._open(file, listed.files[file])
                return opened.read(name).view(opened.specs[name].shape) if name in opened.specs else None
            listed = self._list(file, listed.files[file])

    def files(self) -> Iterator[tuple[str, SavedFile]]:
        """The files of all ranks, in their order. Looks at each; CheckpointError where one is missing or cut off."""

        def below(listed: _Listed) -> Iterator[tuple[str, SavedFile]]:
            for name, saved in listed.files.items():
                yield from below(self._list(name, saved)) if is_joined(name) else [(name, saved)]

        return below(self._top)

    def loss_scaler(self) -> dict[str, float]:
        return self.index.loss_scaler

    def check_all(self) -> None:
        """Read everything. Raises CheckpointError at the first byte that was changed."""
        for file, saved in self.files():
            self.check_file(file, saved)

    def check_file(self, file: str, saved: SavedFile) -> None:
        """Read all of one file. Raises CheckpointError at the first byte that was changed."""
        opened = self._open(file, saved)
        for name in opened.specs:
            opened.read(name)

    def _packed_matrix(self, name: str) -> PackedMatrix:
        if name not in self._packed:
            parameter, slots = self.index.parameters[name], self.own_tensor(0, f"{SLOTS}/{name}")
            if slots is None or slots.shape != parameter.shape[:1]:
                raise CheckpointError(f"checkpoint {self.folder}: does not say which blocks of {name} it holds")
            assert parameter.grid is not None
            self._packed[name] = PackedMatrix(parameter.grid, parameter.shape[1], slots)
        return self._packed[name]

    def _reader(self, name: str, kind: str) -> ReadSlots:
        """Reads whole slots [first, first + count) of a packed parameter, flat."""
        size = prod(self.index.parameters[name].shape[1:])
        return lambda first, count: self._run(f"{kind}/{name}", Run(first * size, count * size))

    def _run(self, key: str, run: Run) -> Tensor:
        found = list(self._pieces(self._top, key, run))
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def _pieces(self, listed: _Listed, key: str, run: Run) -> Iterator[Tensor]:
        """The entries of a run, one file after another."""
        places = listed.places[key]
        at = bisect_right(places, run.start, key=lambda place: place.start) - 1
        start = run.start
        while start < run.end:
            place = places[at]
            end = min(run.end, place.end)
            if is_joined(place.file):
                below = self._list(place.file, listed.files[place.file])
                yield from self._pieces(below, key, Run(start, end - start))
            else:
                opened = self._open(place.file, listed.files[place.file])
                yield opened.read(key, place.offset + start - place.start, end - start)
            start, at = end, at + 1

    def _open(self, file: str, saved: SavedFile) -> RankFile:
        if file not in self._opened:
            self._opened[file] = RankFile(self.folder / file, saved.part)
        return self._opened[file]

    def _list(self, file: str, saved: SavedFile) -> _Listed:
        """What the index of a group of ranks lists."""
        if file not in self._joined:
            self._joined[file] = _Listed(read_joined(self.folder / file, saved))
        return self._joined[file]

    def _check_complete(self) -> None:
        """Every entry of every kind is there exactly once."""
        for key, places in self._top.places.items():
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
    """Whether ``index_damage`` finds nothing."""
    return index_damage(folder) is None


def index_damage(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, as far as `index.json` and the sizes of the files that it lists tell; None:
    it is one. However many ranks have written it, these are few files."""
    try:
        read_index(folder)
    except CheckpointError as error:
        return str(error)
    return None


def damage(folder: Path) -> str | None:
    """The same as far as all indexes and the sizes of all files tell."""
    try:
        with Checkpoint(folder) as checkpoint:
            for _ in checkpoint.files():
                pass
    except CheckpointError as error:
        return str(error)
    return None
