"""Puts checkpoints on disk: each rank its own file, rank 0 the index.

snapshot = HostCopy(engine)                              # once per run; keeps its memory
copy = snapshot.begin({"method/topology/active/head": bits})
tensors = copy()                                         # perhaps in a thread, before anything changes
write_part(partial, rank=3, tensors)                     # every rank, perhaps in a thread
join_parts(partial, rank=3, world_size=4, timeout=1800)  # every rank, after that
commit(store, index, world_size=4, timeout=1800)         # rank 0, when it has written its own part

write_checkpoint(saved, run_folder)                      # from any saved state, by one process
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megasparse.checkpoint.index import Index, SavedFile, SavedParameter, file_entry, parse_file, write_index
from megasparse.checkpoint.joined import GROUP_FILES, file_name, members, top_stride, write_joined
from megasparse.checkpoint.order import Run, band_count, split
from megasparse.checkpoint.rank_file import write_rank_file
from megasparse.checkpoint.reader import METHOD, SLOTS, is_good
from megasparse.checkpoint.saved_state import ITEM_BYTES, WEIGHT, SavedState
from megasparse.checkpoint.store import CHECKPOINTS, CheckpointError, CheckpointStore
from megasparse.checkpoint.tensor_files import TensorSpec, read_json
from megasparse.engine.training_engine import TrainingEngine
from megasparse.layers import PackedLinear
from megasparse.parallel import ShardSpec, shard_spec_of
from megasparse.sparsity.slots import EMPTY
from megasparse.sparsity.topology import Topology
from megasparse.utils.files import write_json

POLL_SECONDS, MAX_POLL_SECONDS = 0.02, 1.0
"""Between two looks for a part: many ranks may be waiting, and all look at one file system."""


@dataclass(frozen=True)
class RankTensors:
    """What a rank writes: tensors on the host by name, and the runs of those that belong to parameters."""

    tensors: dict[str, Tensor]
    runs: dict[str, list[Run]]


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter's weights or moments that a rank writes, as the engine holds them."""

    key: str
    """`<kind>/<parameter>`."""
    spec: ShardSpec
    start: int
    """Position of the first entry in the rank's shard."""
    entries: Tensor


class HostCopy:
    """Copies a rank's part of the training state to the host, into memory that is kept for the next time."""

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._memory: dict[str, Tensor] = {}

    def begin(self, others: Mapping[str, Tensor]) -> Callable[[], RankTensors]:
        """What makes the copy of the state, and of `others` by name: it may be called in a thread, and must have
        returned before weights or moments change. Every rank calls it; nothing is sent between ranks."""
        pieces = list(self._pieces())
        return lambda: self._copy(pieces, others)

    @torch.no_grad()
    def _copy(self, pieces: list[_Piece], others: Mapping[str, Tensor]) -> RankTensors:
        tensors: dict[str, Tensor] = {}
        runs: dict[str, list[Run]] = {}
        rank = self._engine.mesh.tensor_parallel.rank
        for piece in pieces:
            key, total = piece.key, piece.entries.numel()
            memory = self._memory.get(key)
            if memory is None or memory.numel() != total or memory.dtype != piece.entries.dtype:
                memory = self._memory[key] = torch.empty(total, dtype=piece.entries.dtype)
            at, runs[key] = 0, []
            for run, entries in split(piece.spec, rank, piece.start, piece.entries, band_count(piece.spec)):
                memory[at : at + run.numel].copy_(entries)
                at += run.numel
                runs[key].append(run)
            tensors[key] = memory
        return RankTensors(tensors | {name: tensor.cpu() for name, tensor in others.items()}, runs)

    def parameters(self) -> dict[str, SavedParameter]:
        """For the index."""
        layers = self._engine.packed_layers
        specs = {name: shard_spec_of(parameter) for name, parameter in self._engine.model.named_parameters()}
        return {
            name: SavedParameter(spec.shape, band_count(spec), _grid(layers.get(name))) for name, spec in specs.items()
        }

    def slots(self) -> dict[str, Tensor]:
        """The blocks in the slots of packed parameters, as the checkpoint holds them; every rank calls it."""
        ranks, found = self._engine.mesh.tensor_parallel, {}
        for name, layer in self._engine.packed_layers.items():
            topology = Topology(layer.name, layer.mask, layer.block_size, layer.grid, ranks.rank)
            numbers = topology.unit_numbers(0, topology.shard_units)[layer.slot_blocks.clamp(min=0).long()]
            own = torch.where(layer.slot_blocks == EMPTY, EMPTY, numbers)
            found[f"{SLOTS}/{name}"] = (ranks.gather(own) if topology.num_shards > 1 else own).reshape(-1).cpu()
        return found

    def aliases(self) -> dict[str, str]:
        """Further names of shared parameters, and those that they are saved by."""
        names = {parameter: name for name, parameter in self._engine.model.named_parameters()}
        every = self._engine.model.named_parameters(remove_duplicate=False)
        return {alias: names[parameter] for alias, parameter in every if alias != names[parameter]}

    def _pieces(self) -> Iterator[_Piece]:
        """What this rank is the one to write."""
        mesh = self._engine.mesh
        for name, parameter in self._engine.model.named_parameters():
            spec, access = shard_spec_of(parameter), self._engine.access({name: parameter})
            fragment = access.fragments().get(name)
            # Of what tensor-parallel ranks hold alike, the first one's is written.
            if fragment is None or (not spec.is_divided and mesh.tensor_parallel.rank > 0):
                continue
            first, last = 0, fragment.numel
            if access.shard.size < mesh.data_parallel.size:
                # Each data-parallel rank holds everything: they share the writing, not so many that who reads it again
                # must open thousands of files.
                rank, size = mesh.data_parallel.rank, min(mesh.data_parallel.size, GROUP_FILES)
                if rank >= size:
                    continue
                first, last = fragment.numel * rank // size, fragment.numel * (rank + 1) // size
            if first < last:
                for kind, flat in {WEIGHT: fragment.master, **fragment.moments}.items():
                    own = flat.detach().reshape(-1)[first:last]
                    yield _Piece(f"{kind}/{name}", spec, fragment.start + first, own)


def _grid(layer: PackedLinear | None) -> tuple[int, int] | None:
    if layer is None:
        return None
    rows, columns = layer.grid.shape
    return rows, columns


def write_part(partial: Path, rank: int, content: RankTensors) -> None:
    """Write a rank's file and then its part of the index. Raises CheckpointError for values that are not finite, and
    OSError; then nothing is left of the file."""
    try:
        for key in content.runs:
            if content.tensors[key].is_floating_point() and not bool(content.tensors[key].isfinite().all()):
                raise CheckpointError(f"{key} holds a value that is not finite; no checkpoint is made of it")
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in content.tensors.items()}
        part = write_rank_file(partial / file_name(rank), specs, content.tensors.items())
        write_json(partial / _part_name(file_name(rank)), file_entry(part, content.runs), make_folder=False)
    except BaseException:
        with contextlib.suppress(OSError):
            (partial / file_name(rank)).unlink(missing_ok=True)
        raise


def join_parts(
    partial: Path,
    rank: int,
    world_size: int,
    timeout: float,
    failure_of: Callable[[int], str | None] = lambda rank: None,
    group_files: int = GROUP_FILES,
) -> None:
    """What is left to do of the index, of which ``commit`` makes the last part: the first of every `group_files` ranks
    waits for the parts of its group and joins them, the first of every `group_files` groups theirs, and so on.

    failure_of: see ``commit``. Raises CheckpointError where a rank of the group could not write, or did not within
    `timeout` seconds; OSError.
    """
    stride = 1
    while stride < top_stride(world_size, group_files) and rank % (stride * group_files) == 0:
        end = min(rank + stride * group_files, world_size)
        listed, name = members(rank, end, stride), file_name(rank, end)
        # A last group of one index is that index.
        if name not in listed:
            saved = write_joined(partial / name, _collect(partial, listed, timeout, failure_of))
            write_json(partial / _part_name(name), file_entry(saved.part, saved.runs), make_folder=False)
            for other in listed:
                (partial / _part_name(other)).unlink()
        stride *= group_files


def commit(
    store: CheckpointStore,
    index: Index,
    world_size: int,
    timeout: float,
    failure_of: Callable[[int], str | None] = lambda rank: None,
    group_files: int = GROUP_FILES,
) -> Path:
    """Wait for the parts of all ranks, or of groups of many, write the index, and let the checkpoint appear; returns
    its folder.

    failure_of: why a rank cannot write, once it has told. It tells by other ways than the disk that has failed it.
    Raises CheckpointError where a rank could not write, or did not within `timeout` seconds; OSError.
    """
    partial, stride = store.partial(index.step), top_stride(world_size, group_files)
    listed = members(0, world_size, stride)
    files = _collect(partial, listed, timeout, failure_of)
    write_index(replace(index, files=files), partial)
    for name in listed:
        (partial / _part_name(name)).unlink()
    return store.commit(index.step, is_good)


def _collect(
    partial: Path, names: Mapping[str, int], timeout: float, failure_of: Callable[[int], str | None]
) -> dict[str, SavedFile]:
    """What their writers say of files, once all of them have. names: each with the rank that writes it."""
    files, until = {}, time.monotonic() + timeout
    for name, rank in names.items():
        pause = POLL_SECONDS
        while not (partial / _part_name(name)).is_file():
            if reason := failure_of(rank):
                raise CheckpointError(f"rank {rank}: {reason}")
            if not partial.is_dir():
                raise CheckpointError(f"{partial} has been deleted")
            if time.monotonic() > until:
                raise CheckpointError(f"{partial}: rank {rank} has written nothing within {timeout:g} seconds")
            time.sleep(pause)
            pause = min(1.5 * pause, MAX_POLL_SECONDS)
        files[name] = parse_file(read_json(partial / _part_name(name)))
    return files


def write_checkpoint(
    saved: SavedState, run_folder: Path, progress: Callable[[int], None] = lambda done: None, *, keep: int = 1
) -> Path:
    """Write any saved state as a checkpoint of the run in `run_folder`, one tensor in memory at a time.

    progress: called after each parameter with the bytes of weights that are done. keep: newest checkpoints that stay.
    Returns its folder.
    """
    facts, store = saved.facts, CheckpointStore(run_folder / CHECKPOINTS, keep)
    run_folder.mkdir(parents=True, exist_ok=True)
    partial = store.begin(facts.step)
    topology = {f"{METHOD}/topology/{key}": bits.clone() for key, bits in saved.topology().items()}
    specs = {
        f"{kind}/{name}": TensorSpec((prod(shape),), torch.int16 if ITEM_BYTES.get(kind) == 2 else torch.float32)
        for name, shape in saved.shapes.items()
        for kind in saved.kinds(name)
    }
    runs = {key: [Run(0, spec.shape[0])] for key, spec in specs.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        done = 0
        for name, shape in saved.shapes.items():
            for kind in saved.kinds(name):
                yield f"{kind}/{name}", saved.tensor(name, kind).reshape(-1).to(specs[f"{kind}/{name}"].dtype)
            done += 4 * prod(shape)
            progress(done)
        yield from topology.items()

    specs |= {key: TensorSpec(tuple(bits.shape), bits.dtype) for key, bits in topology.items()}
    try:
        part = write_rank_file(partial / file_name(0), specs, tensors())
    except BaseException:
        store.abandon(facts.step)
        raise
    index = Index(
        step=facts.step,
        model=facts.model,
        optimizer_step=saved.step,
        train_state=facts.train_state,
        window_losses=facts.window_losses,
        loss_scaler=dict(saved.loss_scaler()),
        layout={},
        parameters={name: SavedParameter(tuple(shape)) for name, shape in saved.shapes.items()},
        aliases={"head.weight": "embedding.tokens.weight"} if facts.model.get("tie_embeddings") else {},
        files={file_name(0): SavedFile(part, runs)},
    )
    write_index(index, partial)
    return store.commit(index.step, is_good)


def _part_name(name: str) -> str:
    """What its writer says of a file that an index lists."""
    return f"{Path(name).stem}.part.json"
