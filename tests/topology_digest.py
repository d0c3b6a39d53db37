"""A short word for all masks of a rank, by which runs are compared."""

import hashlib
from collections.abc import Mapping

from megasparse.sparsity.topology import Topology, pack_bits


def digest(topologies: Mapping[str, Topology]) -> str:
    """SHA-256 over names and bits of this rank's shards."""
    state = hashlib.sha256()
    for name in sorted(topologies):
        state.update(name.encode())
        state.update(pack_bits(topologies[name].mask).numpy().tobytes())
    return state.hexdigest()
