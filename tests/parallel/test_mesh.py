"""Who a process is, what ranks agree on, and how a lost peer is told from other errors."""

from __future__ import annotations

import pytest
import torch
from harness import run_distributed

from megasparse.parallel import LaunchEnvironment, Mesh, choose_accelerator
from megasparse.parallel.failures import is_lost_peer


def test_the_launcher_says_who_we_are() -> None:
    alone = LaunchEnvironment.from_variables({})
    assert (alone.rank, alone.local_rank, alone.world_size) == (0, 0, 1)
    third = LaunchEnvironment.from_variables({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"})
    assert (third.rank, third.local_rank, third.world_size) == (2, 0, 4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"RANK": "x"}, "RANK: 'x'"), ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK: 4 must be below WORLD_SIZE 4")],
)
def test_nonsense_from_the_launcher_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LaunchEnvironment.from_variables(variables)


def test_the_user_chooses_the_accelerator_before_the_machine() -> None:
    variables = {"DS_ACCELERATOR": "cpu"}
    assert choose_accelerator(variables) == "cpu" == variables["DS_ACCELERATOR"]
    unset: dict[str, str] = {}
    assert choose_accelerator(unset) == unset["DS_ACCELERATOR"]


def agree(mesh: Mesh) -> dict:
    total = mesh.data_parallel.sum_(torch.tensor([1.0, float(mesh.rank)]))
    return {
        "sum": total.tolist(),
        "nobody": mesh.agree_any(False),
        "one": mesh.agree_any(mesh.rank == 1),
        "rows": mesh.gather_rows(torch.tensor([mesh.rank, 7])).tolist(),
    }


def test_ranks_agree() -> None:
    for result in run_distributed(agree, 2, timeout=60):
        assert result == {"sum": [2.0, 1.0], "nobody": False, "one": True, "rows": [[0, 7], [1, 7]]}


def test_only_failed_collectives_are_lost_peers() -> None:
    assert is_lost_peer(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_peer(torch.distributed.DistBackendError("NCCL timeout"))
    assert not is_lost_peer(RuntimeError("shape mismatch"))
    assert not is_lost_peer(ValueError("Connection closed by peer"))
