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

    shard_live: tuple[int, ...]
    """Live units on each tensor-parallel rank."""
    dead_rows: int
    """Rows of units without a live one: outputs that are constant."""
    born: int
    died: int
    ever_live: int


def collect_statistics(
    topologies: Mapping[str, Topology],
    changes: Mapping[str, Change],
    ever_live: Mapping[str, Tensor],
    tensor_parallel: Ranks,
) -> dict[str, LayerStatistics]:
    """Statistics by layer name, the same on every rank; all ranks must call it.

    changes: of the layers that changed, on this rank's shard. ever_live: packed bits of this rank's shards.
    """
    if not topologies:
        return {}
    vectors = [_vector(t, changes.get(name, Change(0, 0)), ever_live[name]) for name, t in topologies.items()]
    joined = tensor_parallel.sum_(torch.cat(vectors)).cpu()
    found = {}
    for (name, topology), part in zip(topologies.items(), joined.split([v.numel() for v in vectors]), strict=True):
        born, died, ever = part[:3].tolist()
        shards = part[3 : 3 + topology.num_shards]
        rows = part[3 + topology.num_shards :]
        found[name] = LayerStatistics(tuple(shards.tolist()), int((rows == 0).sum()), born, died, ever)
    return found


def _vector(topology: Topology, change: Change, ever_live: Tensor) -> Tensor:
    """This shard's share: births, deaths, ever live, live units by shard, live units by row of the whole grid."""
    mask = topology.mask
    # Sums of bools convert them to int64 first: a few rows at a time, so that the conversion stays in the cache.
    live_in_row = torch.cat([some.sum(dim=1) for some in mask.split(max(CHUNK // mask.shape[1], 1))])
    rows = torch.zeros(topology.whole_grid.shape[0], dtype=torch.int64, device=mask.device)
    rows[topology.shard_rows.to(mask.device)] = live_in_row
    shards = torch.zeros(topology.num_shards, dtype=torch.int64, device=mask.device)
    shards[topology.rank if topology.num_shards > 1 else 0] = live_in_row.sum()
    ever = int(unpack_bits(ever_live, topology.shard_units).count_nonzero())
    return torch.cat([torch.tensor([change.born, change.died, ever], device=mask.device), shards, rows])
