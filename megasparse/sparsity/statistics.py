"""Numbers of a topology over all tensor-parallel shards, in one small exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.sparsity.chunks import CHUNK
from megasparse.sparsity.state import Ranks
from megasparse.sparsity.topology import Topology, unpack_bits
from megasparse.sparsity.update import Change


@dataclass(frozen=True)
class LayerStatistics:
    """Units of one whole layer."""

    shard_active: tuple[int, ...]
    """Active units on each tensor-parallel rank."""
    inactive_rows: int
    """Rows of units without an active one: outputs that are constant."""
    grown: int
    dropped: int
    ever_active: int


def collect_statistics(
    topologies: Mapping[str, Topology],
    changes: Mapping[str, Change],
    ever_active: Mapping[str, Tensor],
    tensor_parallel: Ranks,
) -> dict[str, LayerStatistics]:
    """Statistics by layer name, the same on every rank; all ranks must call it.

    changes: of the layers that changed, on this rank's shard. ever_active: packed bits of this rank's shards.
    """
    if not topologies:
        return {}
    vectors = [_vector(t, changes.get(name, Change(0, 0)), ever_active[name]) for name, t in topologies.items()]
    joined = tensor_parallel.sum_(torch.cat(vectors)).cpu()
    found = {}
    for (name, topology), part in zip(topologies.items(), joined.split([v.numel() for v in vectors]), strict=True):
        grown, dropped, ever = part[:3].tolist()
        shards = part[3 : 3 + topology.num_shards]
        rows = part[3 + topology.num_shards :]
        found[name] = LayerStatistics(tuple(shards.tolist()), int((rows == 0).sum()), grown, dropped, ever)
    return found


def _vector(topology: Topology, change: Change, ever_active: Tensor) -> Tensor:
    """This shard's share: births, deaths, ever active, active units by shard, active units by row of the whole grid."""
    mask = topology.mask
    # Sums of bools convert them to int64 first: a few rows at a time, so that the conversion stays in the cache.
    active_in_row = torch.cat([some.sum(dim=1) for some in mask.split(max(CHUNK // mask.shape[1], 1))])
    rows = torch.zeros(topology.whole_grid.shape[0], dtype=torch.int64, device=mask.device)
    rows[topology.shard_rows.to(mask.device)] = active_in_row
    shards = torch.zeros(topology.num_shards, dtype=torch.int64, device=mask.device)
    shards[topology.rank if topology.num_shards > 1 else 0] = active_in_row.sum()
    ever = int(unpack_bits(ever_active, topology.shard_units).count_nonzero())
    return torch.cat([torch.tensor([change.grown, change.dropped, ever], device=mask.device), shards, rows])
