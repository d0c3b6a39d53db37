"""The start: what the user must mend is said at once, and nobody waits for ever for a rank that does not come."""

from __future__ import annotations

import os
import socket
import time

import torch.distributed as dist
from harness import run_distributed

from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.launching.exit import EXPECTED
from megasparse.launching.failures import is_lost_peer


def start(variables: dict[str, str], missing: int | None = None) -> dict:
    """What becomes of the start of a rank; `missing` does not come."""
    os.environ.update(variables)
    environment, began = LaunchEnvironment.from_variables(os.environ), time.monotonic()
    if environment.rank == missing:
        return {}
    try:
        with open_mesh(environment, 1800, start_seconds=4) as mesh:
            # A rank that leaves at once is a lost peer to one that is still connecting.
            mesh.barrier()
            return {}
    except Exception as error:
        words = "; ".join([str(error), *getattr(error, "__notes__", [])])
        kind = "lost peer" if is_lost_peer(error) else "to mend" if isinstance(error, EXPECTED) else "unforeseen"
        # The other rank reads the store of this one.
        time.sleep(3 if environment.rank == 0 and missing is not None else 0)
        return {"kind": kind, "words": words, "seconds": time.monotonic() - began}


def test_a_port_in_use_is_the_users_to_mend_and_the_second_rank_does_not_wait_for_long() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        first, second = run_distributed(start, 2, {"MASTER_PORT": str(port)}, with_mesh=False)
    assert first["kind"] == "to mend"
    assert f"cannot listen at 127.0.0.1:{port}: the port is in use; MASTER_PORT must be" in first["words"]
    assert second["kind"] == "lost peer" and second["seconds"] < 60
    assert f"rank 0 does not answer at 127.0.0.1:{port} within 4 s" in second["words"]


def test_an_address_that_cannot_be_looked_up_is_the_users_to_mend_on_all_ranks() -> None:
    variables = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29500"}
    first, second = run_distributed(start, 2, variables, with_mesh=False)
    assert first["kind"] == second["kind"] == "to mend"
    assert "cannot listen at nowhere.invalid:29500: " in first["words"] and "MASTER_ADDR must be" in first["words"]
    assert "cannot reach nowhere.invalid:29500: " in second["words"]


def test_a_process_alone_needs_neither_address_nor_port() -> None:
    assert run_distributed(start, 1, {"MASTER_ADDR": "nowhere.invalid"}, with_mesh=False) == [{}]


def test_a_rank_that_does_not_come_is_named() -> None:
    first, second, _ = run_distributed(start, 3, {}, 2, with_mesh=False)
    for found in (first, second):
        assert found["kind"] == "lost peer" and 4 <= found["seconds"] < 60
        assert "not started within 4 s: rank 2" in found["words"]


def test_ranks_meet_at_the_store_that_torchrun_keeps() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt in ("0", "1"):
        variables = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": attempt}
        assert run_distributed(start, 2, variables | {"MASTER_PORT": str(store.port)}, with_mesh=False) == [{}, {}]
