"""Processes and their groups: one immutable ``Mesh``, passed to whoever needs it; how tensors are divided over it."""

from megasparse.parallel.group import Axis
from megasparse.parallel.mesh import Mesh
from megasparse.parallel.regions import TensorParallel
from megasparse.parallel.shard_spec import Partition, partition_of

__all__ = [
    "Axis",
    "Mesh",
    "Partition",
    "TensorParallel",
    "partition_of",
]
