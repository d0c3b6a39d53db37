"""The state of an engine, kept on the host while another engine is built in its place.

    saved = MemoryState(engine)
    engine.close()
    ...                                             # the same model, with other capacities of packed storage
    apply_state(engine, read_state(engine, saved, saved.slots_for(engine, masks)))

Every rank keeps the pieces that it owned. They are put together one parameter after the other, as the new engine reads
them, so that no rank ever holds more than its share and one whole shard of a parameter. Each may be read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from megasparse.engine.restore import WEIGHT, loss_scaler_state, optimizer_step
from megasparse.engine.training_engine import TrainingEngine
from megasparse.kernels.block_sparse import pack, unpack
from megasparse.parallel import ShardSpec, shard_spec_of
from megasparse.sparsity.slots import EMPTY, carried_slots

Piece = tuple[int, Tensor]
"""First entry in the flat shard, and the entries."""


class MemoryState:
    """A ``StateSource`` from an engine between two steps; every rank makes one.

    Attributes:
        step: updates that the optimizer has made.
        shapes: of the whole parameters by name, as matrices where they are packed.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self.step = optimizer_step(engine)
        self._device, self._scaler = engine.mesh.device, loss_scaler_state(engine)
        self._packed = {name: layer.slot_blocks.cpu().clone() for name, layer in engine.packed_layers.items()}
        self._grids = {name: tuple(layer.mask.shape) for name, layer in engine.packed_layers.items()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, tuple[int, ...]] = {}
        self._kinds: dict[str, list[str]] = {}
        self._pieces: dict[tuple[str, str], Piece] = {}
        for name, parameter in engine.model.named_parameters():
            spec = shard_spec_of(parameter)
            layer = engine.packed_layers.get(name)
            self.shapes[name] = spec.shape if layer is None else layer.partition.shape
            self._stored[name] = spec.local_shape
            access = engine.access({name: parameter})
            self._shard = access.shard
            fragment = access.fragments().get(name)
            tensors = {} if fragment is None else {WEIGHT: fragment.master, **fragment.moments}
            self._kinds[name] = [WEIGHT]
            if self.step > 0:
                self._kinds[name] += engine.moment_kinds(parameter)
            for kind in self._kinds[name]:
                if fragment is not None:
                    self._pieces[name, kind] = fragment.start, tensors[kind].detach().to("cpu", copy=True)

    def slots_for(self, engine: TrainingEngine, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The block in each slot of the layers that are packed in another engine, by layer. masks: of all its layers,
        by name, on this rank's grid."""
        return {
            layer.name: carried_slots(self._packed.get(name), masks[layer.name].cpu(), layer.capacity)
            for name, layer in engine.packed_layers.items()
        }

    def kinds(self, name: str) -> list[str]:
        return self._kinds[name]

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor:
        shard = self._take(name, kind)
        if name in self._packed:
            shard = unpack(shard, self._packed[name], self._grids[name])
        return shard.reshape(-1)[start : start + numel].clone()

    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
        shard = self._take(name, kind)
        if name not in self._packed:
            return pack(shard, numbers, shard.shape[1] // grid.local_shape[1])
        slots = self._packed[name].long()
        places = torch.full((prod(grid.local_shape) + 1,), EMPTY)
        places[slots[slots != EMPTY]] = torch.arange(len(slots))[slots != EMPTY]
        # The last one stands for no block, as its number -1 finds it.
        found = places[numbers]
        return shard[found.clamp(min=0)].masked_fill_((found == EMPTY)[:, None, None], 0)

    def loss_scaler(self) -> Mapping[str, float]:
        return self._scaler

    def _take(self, name: str, kind: str) -> Tensor:
        """The whole shard of a parameter, on the host, from the pieces of all ranks; they are let go of."""
        start, entries = self._pieces.pop((name, kind), (0, torch.empty(0)))
        # As integers, so that adding keeps every bit, that of -0.0 too.
        whole = torch.zeros(prod(self._stored[name]), dtype=torch.int32)
        is_count = kind == "weight_steps"
        if entries.numel():
            whole[start : start + entries.numel()] = entries.int() if is_count else entries.float().view(torch.int32)
        if self._shard.size > 1:
            whole = self._shard.sum_(whole.to(self._device)).cpu()
        return (whole.to(torch.int16) if is_count else whole.view(torch.float32)).view(self._stored[name])
