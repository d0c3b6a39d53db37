"""Masks that are not what they were, or differ between ranks: all are found, the layer and the ranks are named."""

from __future__ import annotations

import random

import pytest
import torch
from fake_layers import BASE, FakeLayer, FakeState
from harness import run_distributed

from megasparse.config.loader import load_config
from megasparse.launching.failures import MaskError
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.mask_check import check_masks, describe_change, describe_difference, mask_digest
from megasparse.sparsity.topology import Topology, pack_bits

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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([[0, 0, 0]], None),
        ([[0, 1, 1]], "layer layers.0.mlp.up has changed in the memory of rank 0 since"),
        ([[0, 0, 1], [0, 1, 0], [0, 1, 0]], "layer layers.0.mlp.up has changed in the memory of ranks 1, 2 since"),
    ],
)
def test_the_rank_whose_memory_changed_is_named(changed: list[list[int]], message: str | None) -> None:
    found = describe_change(NAMES, torch.tensor(changed).bool())
    assert found is None if message is None else message in found


@pytest.mark.parametrize("block_size", [1, 16])
def test_every_bit_of_a_mask_is_in_its_digest(block_size: int) -> None:
    bits = torch.rand(2, 35) < 0.3
    seen = set()
    for index in (None, *range(70)):
        flipped = bits.clone()
        if index is not None:
            flipped.view(-1)[index] ^= True
        seen.add(mask_digest(Topology("layer", flipped[0].view(5, 7), block_size), pack_bits(flipped[1])))
    assert len(seen) == 71
    assert mask_digest(Topology("layer", bits[0].view(5, 7).clone(), block_size), pack_bits(bits[1])) in seen


def flip_one_bit(mesh: Mesh, tensor_parallel_size: int, kind: str) -> list[str]:
    """What each rank raises before and after one bit of the second layer is wrong on the last rank."""
    tensor_parallel = CommunicationGroup(mesh.rank % tensor_parallel_size, tensor_parallel_size)
    data_parallel = CommunicationGroup(mesh.rank // tensor_parallel_size, mesh.world_size // tensor_parallel_size)
    mesh = Mesh(mesh.device, mesh.world, data_parallel, tensor_parallel, mesh.control)
    torch.manual_seed(tensor_parallel.rank)
    topologies = [Topology(name, torch.rand(8, 6) < 0.5, 4) for name in NAMES]

    def digests() -> list[int]:
        return [mask_digest(topology, pack_bits(topology.mask)) for topology in topologies]

    kept, found = digests(), []
    for _ in range(2):
        try:
            check_masks(NAMES, digests(), kept, mesh)
            found.append("")
        except MaskError as error:
            found.append(str(error))
        if mesh.rank == mesh.world_size - 1:
            topologies[1].mask[3, 5] ^= True
        if kind == "wrong from the beginning":
            kept = digests()
    return found


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel_size", "kind", "message"),
    [
        (1, 1, "changed", "has changed in the memory of rank 0"),
        (4, 2, "changed", "has changed in the memory of rank 3"),
        (3, 1, "wrong from the beginning", "on rank 2 differs from the one that 2 of 3 replicas hold"),
        (4, 2, "wrong from the beginning", "differs between ranks 1, 3, and which"),
    ],
)
def test_all_ranks_raise_alike(world_size: int, tensor_parallel_size: int, kind: str, message: str) -> None:
    results = run_distributed(flip_one_bit, world_size, tensor_parallel_size, kind)
    assert all(result == results[0] for result in results)
    before, after = results[0]
    assert before == "" and f"the mask of layer {NAMES[1]} {message}" in after
    assert "train.resume=auto" in after


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("flipped", ["mask", "ever_active"])
def test_any_flip_is_found_on_one_rank_and_good_masks_pass(block_size: int, flipped: str) -> None:
    config = load_config([], [*BASE, f"sparsity.block_size={block_size}"])
    alone = CommunicationGroup()
    mesh, chance = Mesh(torch.device("cpu"), alone, alone, alone, alone), random.Random(block_size)
    for number in range(30):
        layers = {name: FakeLayer(32, 16, block_size, seed) for seed, name in enumerate(NAMES)}
        controller, state = Controller(config, layers), FakeState(layers)
        controller.start_topologies()
        for step in range(4, 4 * chance.randint(1, 8), 4):
            controller.check_masks(mesh)
            if controller.begin_step(step).changes_topology:
                controller.update_topology(state)
        if number % 2:
            controller.load_state(controller.state())
        controller.check_masks(mesh)
        name = chance.choice(NAMES)
        if flipped == "mask":
            layers[name].mask.view(-1)[chance.randrange(layers[name].mask.numel())] ^= True
        else:
            bits = controller.ever_active[name]
            bits[chance.randrange(bits.numel())] ^= 1 << chance.randrange(8)
        with pytest.raises(MaskError, match=f"the mask of layer {name} has changed in the memory of rank 0"):
            controller.check_masks(mesh)
