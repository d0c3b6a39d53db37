"""The mesh of processes: data parallel x tensor parallel, tensor-parallel ranks next to each other.

    with open_mesh(environment, timeout_seconds=1800, tensor_parallel_size=2) as mesh:     # megasparse.launching
        mesh.data_parallel.sum_(tensor)

Rank r has tensor-parallel rank r % size and data-parallel rank r // size. Nothing here is global: the mesh is passed
in. It is also the `mpu` that DeepSpeed asks for its groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from megasparse.parallel.group import CommunicationGroup
from megasparse.parallel.tree import make_control, own_group


@dataclass(frozen=True)
class Mesh:
    """This process among data_parallel.size x tensor_parallel.size others."""

    device: torch.device
    world: CommunicationGroup
    """All ranks."""
    data_parallel: CommunicationGroup
    """Ranks that hold the same shard of the model and see different samples."""
    tensor_parallel: CommunicationGroup
    """Ranks that share each layer and see the same samples."""
    control: CommunicationGroup
    """All ranks over gloo, for decisions on the host: asking them never waits for the device. Many ranks are a tree of
    groups, see ``tree``."""
    store: dist.Store = field(default_factory=dist.HashStore)
    """Where the ranks have met: short messages of one rank, which the others need not wait for."""

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def world_size(self) -> int:
        return self.world.size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree_any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank must call it and gets the same answer."""
        return bool(self.control.max_(torch.tensor(int(flag))))

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.agree_any(False)

    def post(self, key: str, text: str) -> None:
        """Leave a message for other ranks; a thread may do it. Raises RuntimeError where rank 0 is gone."""
        self.store.set(f"megasparse/{key}", text)

    def posted(self, key: str) -> str | None:
        """The message that a rank has left under this key, where there is one by now."""
        key = f"megasparse/{key}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def from_first(self, tensor: Tensor) -> Tensor:
        """The host tensor of rank 0, on all ranks, which all have one of the same shape and dtype."""
        return self.control.first_(tensor.clone())

    def first_rank_where(self, flag: bool) -> int | None:
        """The first rank whose flag is set; None where none is. Every rank must call it and gets the same answer."""
        found = int(self.control.max_(torch.tensor(self.world_size - self.rank if flag else 0)))
        return self.world_size - found if found else None

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """The host tensor of integers of a rank, on all ranks, which all have one of the same shape and dtype."""
        return self.control.sum_(tensor.clone() if rank == self.rank else torch.zeros_like(tensor))

    def gather_rows(self, row: Tensor) -> Tensor:
        """Stack the equally long 1-D host tensors of all ranks: [world_size, n].

        It costs every rank the bytes of all: to say what is wrong and where, not to find out whether.
        """
        return self.control.gather(row)

    # The names under which DeepSpeed asks for groups (its `mpu`).

    def get_data_parallel_rank(self) -> int:
        return self.data_parallel.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_parallel.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data_parallel.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor_parallel.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor_parallel.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor_parallel.group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.world.rank - self.tensor_parallel.rank

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group


def make_mesh(
    rank: int,
    world_size: int,
    device: torch.device,
    backend: str,
    timeout: timedelta,
    tensor_parallel_size: int,
    store: dist.Store,
) -> Mesh:
    """The mesh over the process group that exists. All ranks call it. store: common to all."""
    ranks = torch.arange(world_size).view(-1, tensor_parallel_size)
    replica, shard = divmod(rank, tensor_parallel_size)
    world = CommunicationGroup(rank, world_size, dist.group.WORLD)

    def axis(own: list[int]) -> CommunicationGroup:
        """Every rank makes its own groups alone: of 16,384 ranks, 2,048 share layers eight by eight."""
        if len(own) == world_size:
            return world
        return CommunicationGroup(own.index(rank), len(own), own_group(own, timeout, backend))

    data_parallel, tensor_parallel = axis(ranks[:, shard].tolist()), axis(ranks[replica].tolist())
    # A group of its own also where training runs over gloo: bookkeeping never waits behind a gradient. The last one.
    control = make_control(world, timeout)
    return Mesh(device, world, data_parallel, tensor_parallel, control, store)
