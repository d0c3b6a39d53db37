"""Processes and their groups: one immutable ``Mesh``, passed to whoever needs it; how tensors are divided over it."""

from megasparse.parallel.group import CommunicationGroup
from megasparse.parallel.mesh import Mesh
from megasparse.parallel.regions import TensorParallel
from megasparse.parallel.shard_spec import ShardSpec, shard_spec_of

__all__ = [
    "CommunicationGroup",
    "Mesh",
    "ShardSpec",
    "TensorParallel",
    "shard_spec_of",
]
