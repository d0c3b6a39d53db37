"""What ranks agree on, and how a lost peer is told from other errors."""

from __future__ import annotations

import torch
from harness import run_distributed

from megasparse.parallel import Mesh
from megasparse.parallel.failures import is_lost_peer


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
