"""Are the masks that data-parallel ranks hold of one shard still the same?

    if is_replica_check_due(step, config):
        check_replicas(controller.topologies, mesh)     # every rank; all raise alike

A flipped bit of one copy would never show: each rank goes on training its own model and the gradients are averaged.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from megasparse.config.schema import RunConfig
from megasparse.launching.failures import GO_ON, ReplicaMismatchError
from megasparse.parallel.mesh import Mesh
from megasparse.sparsity.topology import Topology, pack_bits

MAX_NAMED = 8
"""Ranks that a message names."""


def is_replica_check_due(step: int, config: RunConfig) -> bool:
    """Whether the topology update at `step` (0-based) is one before which the masks are compared."""
    interval = config.train.replica_check_interval
    return interval > 0 and (step // config.sparsity.update_interval) % interval == 0


def check_replicas(topologies: Mapping[str, Topology], mesh: Mesh) -> None:
    """Raise ReplicaMismatchError naming the first layer, in the given order, that differs between replicas."""
    if not topologies or mesh.data_parallel.size == 1:
        return
    digests = mesh.gather_rows(torch.tensor([mask_digest(topology) for topology in topologies.values()]))
    if difference := describe_difference(list(topologies), digests, mesh.tensor_parallel.size):
        raise ReplicaMismatchError(f"{difference}. Checkpoints are as they were; {GO_ON}")


def mask_digest(topology: Topology) -> int:
    """64 bits of a cryptographic hash of the mask."""
    bits = pack_bits(topology.mask).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(bits, digest_size=8).digest(), "little", signed=True)


def describe_difference(names: list[str], digests: Tensor, tensor_parallel_size: int) -> str | None:
    """The first layer whose replicas differ, and which ranks are in the minority; None: all are the same.

    digests: int64 [world_size, layers]. Rank r holds the shard r % tensor_parallel_size.
    """
    for layer, name in enumerate(names):
        for shard in range(tensor_parallel_size):
            ranks = range(shard, len(digests), tensor_parallel_size)
            found = {rank: int(digests[rank, layer]) for rank in ranks}
            if len(set(found.values())) > 1:
                return f"the mask of layer {name} {_describe_ranks(found)}"
    return None


def _describe_ranks(digests: Mapping[int, int]) -> str:
    (common, count), (_, next_count) = Counter(digests.values()).most_common(2)
    if count == next_count:
        return f"differs between {_ranks(list(digests))}, and which of them is wrong cannot be told"
    odd = [rank for rank, digest in digests.items() if digest != common]
    return f"on {_ranks(odd)} differs from the one that {count} of {len(digests)} replicas hold"


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - MAX_NAMED} more" if len(ranks) > MAX_NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:MAX_NAMED]))}{more}"
