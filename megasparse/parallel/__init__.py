"""Processes and their groups: one immutable ``Mesh``, passed to whoever needs it."""

from megasparse.parallel.mesh import LaunchEnvironment, Mesh, choose_accelerator, open_mesh

__all__ = ["LaunchEnvironment", "Mesh", "choose_accelerator", "open_mesh"]
