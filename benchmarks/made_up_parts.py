"""The parts of a checkpoint that the ranks of a world that is not there would write, in the place of each.

make_up_parts(engine, partial, rank)            # all but those of `rank`, which is there

Their fragments are computed from how DeepSpeed divides parameters; that of the rank that is there is compared with what
it has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megasparse.checkpoint.index import file_entry
from megasparse.checkpoint.joined import file_name
from megasparse.checkpoint.order import band_count, split
from megasparse.checkpoint.rank_file import FilePart
from megasparse.checkpoint.reader import METHOD, RANDOM
from megasparse.checkpoint.writing import RankTensors, join_parts, write_part
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import shard_spec_of

EMPTY_BYTES = 64
KINDS = ("fp32", "exp_avg", "exp_avg_sq")


def make_up_parts(engine: TrainingEngine, partial: Path, rank: int) -> None:
    """Write the parts of all other ranks. Raises RuntimeError where the rank's own fragments are not as computed."""
    mesh, divided = engine.mesh, _Division(engine)
    size = mesh.tensor_parallel.size
    own = {
        name: (fragment.start, fragment.numel)
        for name, fragment in engine.access(dict(engine.model.named_parameters())).fragments().items()
    }
    if own != dict(divided.fragments(rank // size)):
        raise RuntimeError(f"rank {rank} holds {own}, computed {dict(divided.fragments(rank // size))}")
    for other in range(mesh.world_size):
        if other == 0 or other // size == rank // size:
            # What this rank may read.
            if other != rank:
                write_part(partial, other, _content(engine, divided, other))
        else:
            _write_empty(partial, other, _content(engine, divided, other))
    # Who joins the parts of its group waits for them.
    for other in reversed(range(mesh.world_size)):
        if other != rank:
            join_parts(partial, other, mesh.world_size, 60)


def _write_empty(partial: Path, rank: int, content: RankTensors) -> None:
    """A part that says what the rank's own would say, of a file in which there is nothing: nobody opens it."""
    name = file_name(rank)
    (partial / name).write_bytes(bytes(EMPTY_BYTES))
    entry = file_entry(FilePart(EMPTY_BYTES, "00000000"), content.runs)
    (partial / f"{Path(name).stem}.part.json").write_text(json.dumps(entry), encoding="utf-8")


class _Division:
    """Which entries of which parameters a data-parallel rank holds."""

    def __init__(self, engine: TrainingEngine) -> None:
        self._parameters = {parameter: name for name, parameter in engine.model.named_parameters()}
        self._size, self._zero = engine.mesh.data_parallel.size, engine._engine.optimizer
        self._is_stage_3 = engine.config.deepspeed.zero_stage == 3

    def fragments(self, rank: int) -> Iterator[tuple[str, tuple[int, int]]]:
        """Start and number of entries by parameter."""
        if self._is_stage_3:
            for parameter, name in self._parameters.items():
                share = parameter.ds_tensor.numel()
                numel = min(share, parameter.ds_numel - rank * share)
                if numel > 0:
                    yield name, (rank * share, numel)
            return
        # Stages 1 and 2: one slice of each flat group.
        for parameters, flat in zip(self._zero.bit16_groups, self._zero.bit16_groups_flat, strict=True):
            share, position = flat.numel() // self._size, 0
            for parameter in parameters:
                start = max(rank * share - position, 0)
                end = min((rank + 1) * share - position, parameter.numel())
                if start < end:
                    yield self._parameters[parameter], (start, end - start)
                position += parameter.numel()


def _content(engine: TrainingEngine, divided: _Division, rank: int) -> RankTensors:
    data_rank, tensor_rank = divmod(rank, engine.mesh.tensor_parallel.size)
    specs = {name: shard_spec_of(parameter) for name, parameter in engine.model.named_parameters()}
    tensors: dict[str, Any] = {f"{RANDOM}/cpu": torch.zeros(16, dtype=torch.uint8)}
    runs: dict[str, Any] = {}
    for name, (start, numel) in divided.fragments(data_rank):
        spec = specs[name]
        if not spec.is_divided and tensor_rank > 0:
            continue
        found = split(spec, tensor_rank, start, torch.zeros(numel), band_count(spec))
        for kind in KINDS:
            runs[f"{kind}/{name}"] = [run for run, _ in found]
            tensors[f"{kind}/{name}"] = torch.zeros(numel)
    if rank == 0:
        # What methods save, which the first rank writes.
        for name, bits in _masks(engine).items():
            tensors[f"{METHOD}/topology/{name}"] = bits
    return RankTensors(tensors, runs)


def _masks(engine: TrainingEngine) -> dict[str, torch.Tensor]:
    """All units active."""
    found = {}
    for name, layer in engine.model.sparse_layers().items():
        units = layer.grid.shape[0] * layer.grid.shape[1]
        bits = torch.full((-(-units // 8),), 255, dtype=torch.uint8)
        found |= {f"active/{name}": bits, f"ever/{name}": bits.clone()}
    return found
