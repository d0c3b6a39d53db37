"""All ranks in a tree of small groups: the same answers as one group, few connections."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch
from harness import run_distributed

from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.parallel.tree import TreeGroup, make_control

TIMEOUT = timedelta(seconds=120)


def connections() -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections(kind="tcp"))


def answers(mesh: Mesh, group_ranks: int) -> dict:
    """What a rank hears over a tree of groups of so many ranks."""
    before = connections()
    control = make_control(mesh.world, TIMEOUT, group_ranks)
    opened = connections() - before
    rank, size = mesh.rank, mesh.world_size
    tree = Mesh(mesh.device, mesh.world, mesh.data_parallel, mesh.tensor_parallel, control)
    generator = torch.Generator().manual_seed(rank)
    floats = torch.rand(5, generator=generator, dtype=torch.float64)
    return {
        "sum": control.sum_(torch.tensor([1, rank, rank**2])).tolist(),
        "floats": control.sum_(floats.clone()).tolist(),
        "expected": mesh.world.sum_(floats.clone()).tolist(),
        "max": control.max_(torch.tensor([rank, -rank, rank == 3])).tolist(),
        "first": tree.from_first(torch.tensor([rank + 7])).tolist(),
        "rows": tree.gather_rows(torch.tensor([-0.0, rank / 3], dtype=torch.float64)).tolist(),
        "row": control.scatter_sum(torch.arange(2 * size).view(size, 2)).tolist(),
        "nobody": tree.first_rank_where(False),
        "somebody": tree.first_rank_where(rank in (size - 1, size // 2)),
        "told": tree.from_rank(torch.tensor([rank * 11]), size - 1).tolist(),
        "any": [tree.agree_any(False), tree.agree_any(rank == size - 1)],
        "levels": [(group.rank, group.size) for group in control.groups],
        "is_tree": isinstance(control, TreeGroup),
        "opened": opened,
    }


@pytest.mark.parametrize(("world_size", "group_ranks"), [(2, 32), (3, 2), (5, 4), (7, 2)])
def test_a_tree_answers_as_one_group_does(world_size: int, group_ranks: int) -> None:
    found = run_distributed(answers, world_size, group_ranks)
    numbers = range(world_size)
    for rank, of_rank in enumerate(found):
        assert of_rank["sum"] == [world_size, sum(numbers), sum(number**2 for number in numbers)]
        assert of_rank["max"] == [world_size - 1, 0, world_size > 3]
        assert of_rank["first"] == [7] and of_rank["told"] == [11 * (world_size - 1)]
        assert of_rank["rows"] == [[-0.0, number / 3] for number in numbers]
        assert str(of_rank["rows"][0][0]) == "-0.0"
        assert of_rank["row"] == [2 * rank * world_size, (2 * rank + 1) * world_size]
        assert of_rank["nobody"] is None and of_rank["somebody"] == world_size // 2
        assert of_rank["any"] == [False, True]
        # The order of a sum is that of the tree: a rounding or two per rank, and the same bits everywhere.
        assert of_rank["floats"] == found[0]["floats"]
        assert of_rank["floats"] == pytest.approx(of_rank["expected"], rel=1e-14 * world_size)
        assert of_rank["is_tree"] == (world_size > group_ranks)
        # A rank is connected with the others of its groups and with no one else.
        assert of_rank["opened"] == sum(size - 1 for _, size in of_rank["levels"])
    if world_size == 7:
        assert [len(of_rank["levels"]) for of_rank in found] == [3, 1, 2, 1, 3, 1, 2]


def test_a_group_alone_is_its_first_rank() -> None:
    alone = CommunicationGroup()
    assert alone.groups == () and make_control(alone, TIMEOUT) is alone
    assert alone.first_(torch.tensor([3])).tolist() == [3]
