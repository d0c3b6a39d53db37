"""Simulated ranks: threads that meet at a barrier to add up a tensor, as an all-reduce does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

SumOverShards = Callable[[Tensor], None]


def on_shards(num_shards: int, function: Callable[[int, SumOverShards], Any]) -> list[Any]:
    """``function(rank, sum_over_shards)`` on every simulated rank; what each returned."""
    barrier, slots = threading.Barrier(num_shards, timeout=20), [None] * num_shards

    def run(rank: int) -> Any:
        def sum_over_shards(tensor: Tensor) -> None:
            slots[rank] = tensor.clone()
            barrier.wait()
            assert len({(slot.shape, slot.dtype) for slot in slots}) == 1, "ranks add up different tensors"
            total = torch.stack(slots).sum(dim=0).to(tensor.dtype)
            barrier.wait()
            tensor.copy_(total)

        try:
            return function(rank, sum_over_shards)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(num_shards) as pool:
        return [future.result() for future in [pool.submit(run, rank) for rank in range(num_shards)]]


def cuts(numel: int, points: Sequence[int]) -> list[tuple[int, int]]:
    """The pieces [start, stop) into which sorted cut points divide a flat tensor; pieces may be empty."""
    bounds = [0, *sorted(min(point, numel) for point in points), numel]
    return list(pairwise(bounds))
