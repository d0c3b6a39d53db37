"""The process groups of a run, from what its launcher said to the mesh.

environment = LaunchEnvironment.from_variables(os.environ)
with open_mesh(environment, timeout_seconds=1800, tensor_parallel_size=2) as mesh:
    mesh.data_parallel.sum_(tensor)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from megasparse.launching.environment import LaunchEnvironment, choose_accelerator
from megasparse.launching.rendezvous import START_SECONDS, open_store
from megasparse.parallel.mesh import Mesh, make_mesh


@contextlib.contextmanager
def open_mesh(
    environment: LaunchEnvironment,
    timeout_seconds: int,
    tensor_parallel_size: int = 1,
    *,
    start_seconds: float = START_SECONDS,
    agree: Callable[[dist.Store], None] = lambda store: None,
) -> Iterator[Mesh]:
    """Start the process groups and hand out the mesh; the groups end with the block.

    timeout_seconds: a collective that waits longer fails. start_seconds: how long the ranks wait for each other at
    first. tensor_parallel_size must divide the world size. agree: called on all ranks, with the store where they have
    met, before they depend on each other in any other way; what it raises is raised.
    """
    assert environment.world_size % tensor_parallel_size == 0, (environment.world_size, tensor_parallel_size)
    device, backend = _device(environment.local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    store = open_store(environment, start_seconds)
    agree(store)
    store.set_timeout(timeout)
    rank, world_size = environment.rank, environment.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        yield make_mesh(rank, world_size, device, backend, timeout, tensor_parallel_size, store)
    finally:
        # After a failed collective a destroy would wait for peers that are gone: leaving is enough then.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _device(local_rank: int) -> tuple[torch.device, str]:
    if choose_accelerator(os.environ) == "cuda":
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank), "nccl"
    return torch.device("cpu"), "gloo"
