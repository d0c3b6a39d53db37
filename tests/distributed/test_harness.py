"""The helper that runs ranks: results come back by rank, failures name the rank, nothing hangs, nothing is left."""

from __future__ import annotations

import os
import time

import pytest
import torch
from harness import RankFailure, run_distributed


def add_up(mesh, scale):
    total = mesh.data_parallel.sum_(torch.tensor([scale * (mesh.rank + 1)]))
    return {"rank": mesh.rank, "size": mesh.world_size, "total": total}


def fail_on_second(mesh):
    if mesh.rank == 1:
        raise KeyError("the second rank is unhappy")
    mesh.barrier()


def die(mesh):
    if mesh.rank == 0:
        os._exit(7)
    mesh.barrier()


def hang(folder):
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)


def test_results_come_back_by_rank() -> None:
    results = run_distributed(add_up, 2, 0.5)
    assert [(r["rank"], r["size"]) for r in results] == [(0, 2), (1, 2)]
    assert all(torch.equal(r["total"], torch.tensor([1.5])) for r in results)


def test_an_exception_is_reported_with_rank_and_traceback() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailure, match=r"rank 1 raised:(.|\n)*fail_on_second(.|\n)*the second rank is unhappy"):
        run_distributed(fail_on_second, 2)
    # Not after the time limit of 600 s.
    assert time.monotonic() - started < 300


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RankFailure, match="rank 0 ended with exit code 7"):
        run_distributed(die, 2)


def test_a_hanging_rank_is_killed_and_says_where(tmp_path) -> None:
    with pytest.raises(RankFailure, match=r"rank 0 was not done after 5 s:(.|\n)*in hang"):
        run_distributed(hang, 2, tmp_path, timeout=5, with_mesh=False)
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / rank).read_text()), 0)
