"""Copies of a mask on several ranks: differences are found, and the layer and the ranks are named."""

from __future__ import annotations

import pytest
import torch
from harness import run_distributed

from megasparse.config.loader import check_config
from megasparse.launching.failures import ReplicaMismatchError
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.replicas import check_replicas, describe_difference, is_replica_check_due, mask_digest
from megasparse.sparsity.topology import Topology

NAMES = ["layers.0.attention.qkv", "layers.0.mlp.up", "layers.1.mlp.up"]


def digests(world_size: int, **changed: int) -> torch.Tensor:
    """Equal rows but for the entries named `r<rank>_<layer>`."""
    rows = torch.tensor([7, 8, 9]).repeat(world_size, 1)
    for place, value in changed.items():
        rank, layer = map(int, place[1:].split("_"))
        rows[rank, layer] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "tensor_parallel_size", "message"),
    [
        (digests(4), 1, None),
        (digests(1), 1, None),
        (digests(4, r0_1=5, r2_1=5), 2, None),  # tensor-parallel shards are no copies of each other
        (digests(2, r1_1=5), 1, "layer layers.0.mlp.up differs between ranks 0, 1, and which of them is wrong"),
        (digests(3, r0_2=5, r2_1=5), 1, "layer layers.0.mlp.up on rank 2 differs from the one that 2 of 3 replicas"),
        (digests(5, r0_2=5, r3_2=6), 1, "layer layers.1.mlp.up on ranks 0, 3 differs from the one that 3 of 5"),
        (digests(3, r0_0=5, r1_0=6), 1, "attention.qkv differs between ranks 0, 1, 2"),
        (digests(6, r3_0=5), 2, "attention.qkv on rank 3 differs from the one that 2 of 3 replicas hold"),
        (digests(30, **{f"r{rank}_0": 5 for rank in range(10)}), 1, "on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"),
    ],
)
def test_the_first_layer_and_the_minority_are_named(
    rows: torch.Tensor, tensor_parallel_size: int, message: str | None
) -> None:
    found = describe_difference(NAMES, rows, tensor_parallel_size)
    assert found is None if message is None else message in found


@pytest.mark.parametrize("block_size", [1, 16])
def test_every_bit_of_a_mask_is_in_its_digest(block_size: int) -> None:
    mask = torch.rand(5, 7) < 0.3
    seen = {mask_digest(Topology("layer", mask, block_size))}
    for index in range(mask.numel()):
        flipped = mask.clone()
        flipped.view(-1)[index] ^= True
        seen.add(mask_digest(Topology("layer", flipped, block_size)))
    assert len(seen) == mask.numel() + 1
    assert mask_digest(Topology("layer", mask.clone(), block_size)) in seen


def test_masks_are_compared_at_every_kth_topology_step() -> None:
    settings = {"train": {"replica_check_interval": 3}, "sparsity": {"update_interval": 5}}
    config = check_config(settings)
    assert [step for step in range(5, 60, 5) if is_replica_check_due(step, config)] == [15, 30, 45]
    settings["train"]["replica_check_interval"] = 0
    assert not any(is_replica_check_due(step, check_config(settings)) for step in range(5, 60, 5))


def flip_one_bit(mesh: Mesh, tensor_parallel_size: int) -> list[str]:
    """What each rank raises before and after one bit of the second layer is flipped on the last rank."""
    tensor_parallel = CommunicationGroup(mesh.rank % tensor_parallel_size, tensor_parallel_size)
    data_parallel = CommunicationGroup(mesh.rank // tensor_parallel_size, mesh.world_size // tensor_parallel_size)
    mesh = Mesh(mesh.device, mesh.world, data_parallel, tensor_parallel, mesh.control)
    torch.manual_seed(tensor_parallel.rank)
    topologies = {name: Topology(name, torch.rand(8, 6) < 0.5, 4) for name in NAMES}
    found = []
    for _ in range(2):
        try:
            check_replicas(topologies, mesh)
            found.append("")
        except ReplicaMismatchError as error:
            found.append(str(error))
        if mesh.rank == mesh.world_size - 1:
            topologies[NAMES[1]].mask[3, 5] ^= True
    return found


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_all_ranks_raise_alike(tensor_parallel_size: int) -> None:
    world_size = 3 if tensor_parallel_size == 1 else 4
    results = run_distributed(flip_one_bit, world_size, tensor_parallel_size)
    assert all(result == results[0] for result in results)
    before, after = results[0]
    expected = "on rank 2 differs" if tensor_parallel_size == 1 else "differs between ranks 1, 3"
    assert before == "" and f"the mask of layer {NAMES[1]} {expected}" in after
    assert "train.resume=auto" in after
