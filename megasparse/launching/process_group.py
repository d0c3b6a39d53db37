"""The process groups of a run, from what its launcher said to the mesh.

environment = LaunchEnvironment.from_variables(os.environ)
with open_mesh(environment, timeout_seconds=1800, tensor_parallel_size=2) as mesh:
    mesh.data_parallel.sum_(tensor)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megasparse.launching.environment import OPEN_MPI, TORCH, LaunchEnvironment, choose_accelerator
from megasparse.launching.rendezvous import START_SECONDS, open_store
from megasparse.parallel.mesh import Mesh, make_mesh
from megasparse.parallel.tree import GROUP_RANKS

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables with the GPUs that a process may see."""


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
    if backend == "gloo" and environment.world_size > GROUP_RANKS:
        # Connections between ranks that have something to send, not between all pairs: of 20 ranks each has 2 after a
        # sum, instead of 19.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=timeout_seconds)
    store = open_store(environment, start_seconds)
    if device.type == "cuda":
        tell_deepspeed(device.index, os.environ)
    agree(store)
    store.set_timeout(timeout)
    rank, world_size = environment.rank, environment.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    failed = True
    try:
        yield make_mesh(rank, world_size, device, backend, timeout, tensor_parallel_size, store)
        failed = False
    finally:
        # NCCL's destroy waits for collectives that have begun, and peers may never join those of a rank that failed: it
        # would hang before it has said why. Leaving is enough then.
        if not (failed and backend == "nccl" and world_size > 1):
            # After a failed collective gloo would wait for peers that are gone, too.
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()


def _device(local_rank: int) -> tuple[torch.device, str]:
    if choose_accelerator(os.environ) == "cuda":
        index = device_index(local_rank, torch.cuda.device_count(), os.environ)
        torch.cuda.set_device(index)
        return torch.device("cuda", index), "nccl"
    return torch.device("cpu"), "gloo"


def device_index(local_rank: int, count: int, variables: Mapping[str, str]) -> int:
    """Number of this rank's GPU among the `count` that the process sees.

    Launchers such as srun with --gpus-per-task show each rank its own one, which is number 0 for all of them. Raises
    ValueError where there is no GPU for the rank.
    """
    if local_rank < count:
        return local_rank
    shown = next((name for name in VISIBLE if name in variables), VISIBLE[0])
    if count == 1 and len(variables.get(shown, "").split(",")) == 1 and variables.get(shown):
        return 0
    raise ValueError(
        f"{shown}: {variables.get(shown)} in the environment of local rank {local_rank}, for which torch finds "
        f"{count} GPU{'s' if count != 1 else ''}; must be one GPU for each rank of a host, or start fewer ranks"
    )


def tell_deepspeed(index: int, variables: MutableMapping[str, str]) -> None:
    """DeepSpeed takes the local rank for the number of the GPU, and compares it with that of Open MPI."""
    for name in (TORCH.local_rank, OPEN_MPI.local_rank):
        if name in variables:
            variables[name] = str(index)
