"""Counts what a rank sends: wraps the collectives of torch.distributed, which DeepSpeed's go through as well.

    with counted() as traffic:          # before DeepSpeed is set up, which keeps the functions that it finds
        before = traffic.bytes_sent
        train_step(...)
        sent = traffic.bytes_sent - before

Bytes are those of the usual ring algorithms: an all-reduce of b bytes over n ranks sends 2 b (n - 1) / n, a gather of b
bytes in all, or a scatter of them, b (n - 1) / n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

# Collective -> (position of the tensor that is sent in full, or of the part that is gathered, factor of its bytes).
ALL_REDUCE, GATHER, SCATTER, BROADCAST = "all_reduce", "gather", "scatter", "broadcast"
KINDS = {
    "all_reduce": (ALL_REDUCE, 0),
    "all_gather_into_tensor": (GATHER, 0),
    "reduce_scatter_tensor": (SCATTER, 1),
    "reduce": (BROADCAST, 0),
    "broadcast": (BROADCAST, 0),
}


@dataclass
class Traffic:
    """Bytes sent by kind of collective, and calls."""

    bytes_by_kind: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def bytes_sent(self) -> float:
        return sum(self.bytes_by_kind.values())


@contextmanager
def counted() -> Iterator[Traffic]:
    traffic, patches = Traffic(), []
    for name, (kind, position) in KINDS.items():
        for module in (dist, dist.distributed_c10d):
            original = getattr(module, name)
            patches.append(patch.object(module, name, _counting(original, name, kind, position, traffic)))
    for each in patches:
        each.start()
    try:
        yield traffic
    finally:
        for each in patches:
            each.stop()


def _counting(original: Callable, name: str, kind: str, position: int, traffic: Traffic) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        ranks = dist.get_world_size(kwargs.get("group"))
        values = [
            *args,
            *(kwargs[key] for key in ("output_tensor", "input_tensor", "output", "input") if key in kwargs),
        ]
        tensor = values[position] if "tensor" not in kwargs else kwargs["tensor"]
        size = tensor.numel() * tensor.element_size()
        share = (ranks - 1) / ranks
        factor = {ALL_REDUCE: 2 * share, GATHER: share, SCATTER: share, BROADCAST: share}[kind]
        traffic.bytes_by_kind[name] += size * factor
        traffic.calls[name] += 1
        return original(*args, **kwargs)

    return call
