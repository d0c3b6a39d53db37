"""How the process groups end: in order, or not at all where that would wait for ranks that do not come."""

from __future__ import annotations

import contextlib

import pytest
import torch

from megasparse.launching import LaunchEnvironment, process_group


class Store:
    def set_timeout(self, timeout: object) -> None:
        pass


@pytest.mark.parametrize(
    ("backend", "ranks", "fails", "destroyed"),
    [
        ("nccl", 2, True, False),
        ("nccl", 2, False, True),
        ("nccl", 1, True, True),
        ("gloo", 2, True, True),
    ],
)
def test_a_failed_rank_among_others_leaves_without_nccls_end(backend, ranks, fails, destroyed, monkeypatch) -> None:
    """Which waits for collectives that have begun, and the others may never join."""
    ended: list[bool] = []
    monkeypatch.setattr(process_group, "_device", lambda local_rank: (torch.device("cpu"), backend))
    monkeypatch.setattr(process_group, "open_store", lambda environment, seconds: Store())
    monkeypatch.setattr(process_group, "make_mesh", lambda *words: None)
    monkeypatch.setattr(process_group.dist, "init_process_group", lambda *words, **options: None)
    monkeypatch.setattr(process_group.dist, "destroy_process_group", lambda: ended.append(True))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": str(ranks)}
    variables = {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", **place}
    environment = LaunchEnvironment.from_variables(variables)
    with contextlib.suppress(torch.OutOfMemoryError), process_group.open_mesh(environment, timeout_seconds=9):
        if fails:
            raise torch.OutOfMemoryError("out of memory")
    assert bool(ended) == destroyed
