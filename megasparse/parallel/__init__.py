"""Processes and their groups: one immutable ``Mesh``, passed to whoever needs it; how tensors are divided over it."""

from megasparse.parallel.axis import Axis
from megasparse.parallel.launch import LaunchEnvironment, choose_accelerator
from megasparse.parallel.mappings import TensorParallel
from megasparse.parallel.mesh import Mesh, open_mesh
from megasparse.parallel.partition import Partition, partition_of

__all__ = [
    "Axis",
    "LaunchEnvironment",
    "Mesh",
    "Partition",
    "TensorParallel",
    "choose_accelerator",
    "open_mesh",
    "partition_of",
]
