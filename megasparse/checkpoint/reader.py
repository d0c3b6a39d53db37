"""Whole float32 tensors from a checkpoint's DeepSpeed files, whatever ZeRO stage and number of ranks wrote them.

    reader = CheckpointReader(folder)
    for name in reader.names:
        weight = reader.tensor(name, "fp32")
        moments = {kind: reader.tensor(name, kind) for kind in reader.kinds(name) if kind != "fp32"}

No process group and no engine is needed. Files are mapped, not read: memory holds one tensor at a time. Each file keeps
a parameter as a piece of something flat, in a place that depends on the stage:

- stage 0: everything in ``mp_rank_TT_model_states.pt``, weights by name, moments by number;
- stages 1 and 2: ``*zero_pp_rank_D_mp_rank_TT_optim_states.pt`` holds a slice of each flat parameter group and, by
  name, where in it which part of a parameter lies; the parts of the ranks follow each other;
- stage 3: the same file holds, for each group, an equal share of every parameter, one after another in the order of
  ``param_shapes`` of the model states; the last share is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from safetensors.torch import load_file
from torch import Tensor

from megasparse.checkpoint.layout import read_layout
from megasparse.checkpoint.saved_state import MOMENTS, WEIGHT, RunFacts
from megasparse.checkpoint.store import TOPOLOGY, CheckpointError, read_manifest
from megasparse.engine.safe_checkpoint import load_data


@dataclass(frozen=True)
class Piece:
    """Entries [start, start + numel) of something flat in a file; a part of one parameter."""

    weights: Tensor
    state: Mapping[str, Any]
    """Optimizer state of the flat thing: `step` and moments; empty before the first optimizer step."""
    start: int
    numel: int

    def read(self, kind: str) -> Tensor:
        flat = self.weights if kind == WEIGHT else self.state[kind]
        return flat.view(-1).narrow(0, self.start, self.numel)


class CheckpointReader:
    """One checkpoint folder. Raises CheckpointError where files are missing, damaged or of another kind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if self.manifest.is_universal_only:
            raise CheckpointError(f"checkpoint {folder}: it holds only its universal form")
        self.layout = read_layout(folder)
        try:
            self._shards = [self._index(rank) for rank in range(self.layout.tensor_parallel_size)]
            self._check_complete()
            self.step = self._common_step()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {folder}: its files are of another kind: {error!r}") from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: partition.shape for name, partition in self.layout.parameters.items()}

    @property
    def names(self) -> list[str]:
        """Names of the parameters in the order of the model."""
        return list(self.layout.parameters)

    def kinds(self, name: str) -> list[str]:
        """`fp32`, the master weight, and the moments that are kept: `exp_avg`, `exp_avg_sq`, `weight_steps`."""
        state = self._shards[0][name][0].state
        return [WEIGHT, *(kind for kind in MOMENTS if kind in state)]

    def tensor(self, name: str, kind: str) -> Tensor:
        """A whole parameter or moment in memory of its own: float32, per-weight steps int16."""
        partition = self.layout.parameters[name]
        # Of a replicated parameter the first rank's copy is as good as any.
        shards = [self._shard(pieces[name], kind, partition.local_shape) for pieces in self._shards[: partition.size]]
        whole = partition.merge(shards)
        return whole if whole.dtype == torch.int16 else whole.to(torch.float32)

    def copies_differ(self, name: str, kind: str) -> bool:
        """Whether tensor-parallel ranks hold different values of a parameter that all of them should hold alike."""
        shape = self.layout.parameters[name].local_shape
        first, *others = (self._shard(pieces[name], kind, shape) for pieces in self._shards)
        return not self.layout.parameters[name].is_divided and any(not torch.equal(first, other) for other in others)

    def client_state(self) -> dict[str, Any]:
        """What the run saved besides tensors, on its first rank."""
        return self._model_states(0)

    @property
    def facts(self) -> RunFacts:
        client = self.client_state()
        try:
            return RunFacts(self.manifest.step, self.manifest.model, client["train_state"], client["window_losses"])
        except KeyError as error:
            raise CheckpointError(f"checkpoint {self.folder}: its files lack {error}") from None

    def topology(self) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / TOPOLOGY)
        except Exception as error:
            raise CheckpointError(f"checkpoint {self.folder}: {TOPOLOGY} is not readable: {error}") from None

    def division(self, name: str) -> dict[str, Any]:
        """How DeepSpeed's own loader is to divide a parameter; ours asks the model instead."""
        partition = self.layout.parameters[name]
        if partition.dim is None:
            return {}
        if len(set(partition.divided_parts)) == 1:
            return {"cat_dim": partition.dim, "param_n_sub_params": len(partition.divided_parts)}
        shape = tuple(partition.divided_parts if at == partition.dim else n for at, n in enumerate(partition.shape))
        return {"sub_param_shape": SubparamShape(patterns=[name], shape=shape, partition_dim=partition.dim)}

    def loss_scaler(self) -> dict[str, float]:
        """Numbers of the loss scaler (float16 training); empty for stage 0, which has none."""
        if self.layout.zero_stage == 0:
            return {}
        scaler = self._optimizer_states(0, 0)["loss_scaler"]
        return {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)}

    def _shard(self, pieces: list[Piece], kind: str, shape: tuple[int, ...]) -> Tensor:
        try:
            return torch.cat([piece.read(kind) for piece in pieces]).view(shape)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"checkpoint {self.folder}: a piece of {kind} is not there: {error}") from error

    def _index(self, tensor_rank: int) -> dict[str, list[Piece]]:
        """Where the shard of a tensor-parallel rank lies: the pieces of each parameter in their order."""
        pieces: dict[str, list[Piece]] = {name: [] for name in self.layout.parameters}
        if self.layout.zero_stage == 0:
            found = self._whole_pieces(tensor_rank)
        elif self.layout.zero_stage in (1, 2):
            found = self._sliced_pieces(tensor_rank)
        else:
            found = self._shared_pieces(tensor_rank)
        for name, piece in found:
            pieces[name].append(piece)
        return pieces

    def _whole_pieces(self, tensor_rank: int) -> Iterator[tuple[str, Piece]]:
        content = self._model_states(tensor_rank)
        state = content["optimizer"]["state"]
        for number, name in enumerate(name for group in self.layout.groups for name in group):
            weight = content["module"][name]
            yield name, Piece(weight, state.get(number, {}), 0, weight.numel())

    def _sliced_pieces(self, tensor_rank: int) -> Iterator[tuple[str, Piece]]:
        for data_rank in range(self.layout.data_parallel_size):
            content = self._optimizer_states(data_rank, tensor_rank)
            state = content["base_optimizer_state"]["state"]
            for group, addresses in enumerate(content["param_slice_mappings"]):
                weights = content["single_partition_of_fp32_groups"][group]
                for name, address in addresses.items():
                    yield name, Piece(weights, state.get(group, {}), address.start, address.numel)

    def _shared_pieces(self, tensor_rank: int) -> Iterator[tuple[str, Piece]]:
        shapes = self._model_states(tensor_rank)["param_shapes"]
        for data_rank in range(self.layout.data_parallel_size):
            content = self._optimizer_states(data_rank, tensor_rank)
            state = content["optimizer_state_dict"]["state"]
            for group, weights in enumerate(content["fp32_flat_groups"]):
                start = 0
                for name, shape in shapes[group].items():
                    share = -(-prod(shape) // self.layout.data_parallel_size)
                    numel = min(share, prod(shape) - data_rank * share)
                    if numel > 0:
                        yield name, Piece(weights, state.get(group, {}), start, numel)
                    start += share

    def _check_complete(self) -> None:
        for rank, pieces in enumerate(self._shards):
            for name, partition in self.layout.parameters.items():
                found, expected = sum(piece.numel for piece in pieces[name]), prod(partition.local_shape)
                if found != expected:
                    raise CheckpointError(
                        f"checkpoint {self.folder}: the files of tensor-parallel rank {rank} hold {found} of "
                        f"{expected} entries of {name}"
                    )

    def _common_step(self) -> int:
        """Number of optimizer steps done; 0 where there are no moments yet."""
        every = (piece for shard in self._shards for pieces in shard.values() for piece in pieces)
        steps = {int(piece.state.get("step", 0)) for piece in every}
        if len(steps) != 1:
            raise CheckpointError(f"checkpoint {self.folder}: its optimizer steps differ: {sorted(steps)}")
        return steps.pop()

    def _model_states(self, tensor_rank: int) -> dict[str, Any]:
        prefix = "zero_pp_rank_0_" if self.layout.zero_stage == 3 else ""
        return self._load(f"{prefix}mp_rank_{tensor_rank:02d}_model_states.pt")

    def _optimizer_states(self, data_rank: int, tensor_rank: int) -> dict[str, Any]:
        ending = f"zero_pp_rank_{data_rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
        # Runs in bfloat16 put that word in front.
        name = next((name for name in self.manifest.files if name in (ending, f"bf16_{ending}")), ending)
        return self._load(name)["optimizer_state_dict"]

    def _load(self, name: str) -> Any:
        try:
            return load_data(self.folder / name, mmap=True)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
