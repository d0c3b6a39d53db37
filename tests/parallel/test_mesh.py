"""What ranks agree on, and how a lost peer is told from other errors."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from datetime import timedelta

import pytest
import torch
from harness import run_distributed

from megasparse.launching import LaunchEnvironment
from megasparse.launching.failures import is_lost_peer
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.parallel.mesh import make_mesh


def agree(mesh: Mesh) -> dict:
    total = mesh.data_parallel.sum_(torch.tensor([1.0, float(mesh.rank)]))
    return {
        "sum": total.tolist(),
        "nobody": mesh.agree_any(False),
        "one": mesh.agree_any(mesh.rank == 1),
        "rows": mesh.gather_rows(torch.tensor([mesh.rank, 7])).tolist(),
    }


def test_ranks_agree() -> None:
    for result in run_distributed(agree, 2):
        assert result == {"sum": [2.0, 1.0], "nobody": False, "one": True, "rows": [[0, 7], [1, 7]]}


def test_only_failed_collectives_are_lost_peers() -> None:
    assert is_lost_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_peer(torch.distributed.DistBackendError("NCCL timeout"))
    assert not is_lost_peer(RuntimeError("shape mismatch"))
    assert not is_lost_peer(ValueError("Connection closed by peer"))


def describe(mesh: Mesh) -> dict:
    """Who this rank is in a mesh of two by two, and what it hears from others."""
    environment = LaunchEnvironment.from_variables(os.environ)
    mesh = make_mesh(
        environment.rank, environment.world_size, mesh.device, "gloo", timedelta(seconds=60), 2, mesh.store
    )
    own = torch.tensor([mesh.rank])
    return {
        "data": mesh.data_parallel.gather(own).flatten().tolist(),
        "tensor": mesh.tensor_parallel.gather(own).flatten().tolist(),
        "sum": mesh.tensor_parallel.sum_(own.clone()).item(),
        "max": mesh.data_parallel.max_(own.clone()).item(),
        "scattered": mesh.world.scatter_sum(torch.arange(8).view(4, 2) * (mesh.rank + 1)).tolist(),
        "flags": mesh.tensor_parallel.gather(own > 1).flatten().tolist(),
        "deepspeed": [
            mesh.get_data_parallel_rank(),
            mesh.get_data_parallel_world_size(),
            mesh.get_model_parallel_rank(),
            mesh.get_model_parallel_world_size(),
            mesh.get_tensor_model_parallel_src_rank(),
        ],
        "groups": mesh.get_data_parallel_group() is mesh.data_parallel.group
        and mesh.get_model_parallel_group() is mesh.get_tensor_model_parallel_group(),
    }


def test_tensor_parallel_ranks_are_neighbours() -> None:
    for rank, found in enumerate(run_distributed(describe, 4)):
        replica, shard = divmod(rank, 2)
        assert found["data"] == [shard, shard + 2] and found["tensor"] == [2 * replica, 2 * replica + 1]
        assert found["sum"] == 4 * replica + 1 and found["max"] == shard + 2
        assert found["scattered"] == [20 * rank, 20 * rank + 10]
        assert found["flags"] == [replica == 1] * 2
        assert found["deepspeed"] == [replica, 2, shard, 2, 2 * replica] and found["groups"]


def test_an_axis_of_one_needs_no_group() -> None:
    axis, tensor = CommunicationGroup(), torch.arange(6.0).view(2, 3)
    assert torch.equal(axis.sum_(tensor.clone()), tensor) and torch.equal(axis.max_(tensor.clone()), tensor)
    assert torch.equal(axis.gather(tensor), tensor[None]) and torch.equal(axis.scatter_sum(tensor[None]), tensor)


def test_a_mesh_cannot_be_changed() -> None:
    mesh = Mesh(
        torch.device("cpu"), CommunicationGroup(), CommunicationGroup(), CommunicationGroup(), CommunicationGroup()
    )
    with pytest.raises(FrozenInstanceError):
        mesh.device = torch.device("meta")
