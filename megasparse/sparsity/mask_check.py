"""Are the masks that a rank holds still those of the last topology update, and the same on all replicas?

    kept = [mask_digest(topology, ever_active) for ...]         # after each change
    check_masks(names, digests now, kept, mesh)                 # before the next, and before saving; every rank

A flipped bit would never show: each rank goes on training its own model and the gradients are averaged. The kept digest
finds it on a single rank too; the comparison finds masks that were wrong from the beginning.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megasparse.launching.failures import GO_ON, MaskError
from megasparse.parallel.mesh import Mesh
from megasparse.sparsity.topology import Topology, pack_bits

MAX_NAMED = 8
"""Ranks that a message names."""


def check_masks(names: Sequence[str], digests: Sequence[int], kept: Sequence[int], mesh: Mesh) -> None:
    """Raise MaskError naming the first layer, in the given order, whose mask is wrong, and the ranks that hold it.

    digests, kept: of this rank's layers, now and after the last change. Every rank calls it; all raise alike.
    """
    if not names or _all_right(digests, kept, mesh):
        return
    now, before = mesh.gather_rows(torch.tensor([*digests, *kept])).chunk(2, dim=1)
    wrong = describe_change(names, now != before) or describe_difference(names, now, mesh.tensor_parallel.size)
    if wrong:
        raise MaskError(f"{wrong}. Checkpoints are as they were; {GO_ON}")


def _all_right(digests: Sequence[int], kept: Sequence[int], mesh: Mesh) -> bool:
    """Whether no rank's masks have changed and all replicas are equal, by one reduction of a few numbers: the largest
    and the smallest digest of all layers, of each tensor-parallel shard."""
    joined = hashlib.blake2b(torch.tensor(digests).numpy().tobytes(), digest_size=8).digest()
    digest = int.from_bytes(joined, "little", signed=True)
    shards, own = mesh.tensor_parallel.size, mesh.tensor_parallel.rank
    row = torch.full((1 + 2 * shards,), torch.iinfo(torch.int64).min)
    row[0] = list(digests) != list(kept)
    # The complement turns the order round, without a number that overflows.
    row[1 + 2 * own], row[2 + 2 * own] = digest, ~digest
    changed, *bounds = mesh.control.max_(row).tolist()
    return not changed and all(
        largest == ~smallest for largest, smallest in zip(bounds[::2], bounds[1::2], strict=True)
    )


def mask_digest(topology: Topology, ever_active: Tensor) -> int:
    """64 bits of a cryptographic hash of the mask and of the packed bits of units that were ever active."""
    digest = hashlib.blake2b(pack_bits(topology.mask).numpy(), digest_size=8)
    digest.update(ever_active.numpy())
    return int.from_bytes(digest.digest(), "little", signed=True)


def describe_change(names: Sequence[str], changed: Tensor) -> str | None:
    """The first layer that has changed, and on which ranks; None: none has. changed: bool [world_size, layers]."""
    for layer, name in enumerate(names):
        ranks = changed[:, layer].nonzero().view(-1).tolist()
        if ranks:
            return (
                f"the mask of layer {name} has changed in the memory of {_ranks(ranks)} since the last topology update"
            )
    return None


def describe_difference(names: Sequence[str], digests: Tensor, tensor_parallel_size: int) -> str | None:
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
