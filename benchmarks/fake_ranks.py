"""One rank of a world that is not there: process groups, a store and files that count what the rank asks of them.

    ledger = Ledger()
    with counted_world(ledger):
        ...                            # the product's own code: open_mesh, engines, checkpoints
    ledger.counts["start"]             # {"collectives": 12, "bytes": 4096, ...}

Groups are of two kinds, one in place of NCCL and one in place of gloo. What other ranks would send is made up: sums
keep this rank's share, gathers repeat it. So the calls are the real ones and the numbers are not.

Bytes are those that a rank sends by the usual ring algorithms: an all-reduce of b bytes over n ranks 2 b (n - 1) / n, a
gather of b bytes in all, or a scatter of them, b (n - 1) / n, a broadcast b.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.futures import Future

DEVICE, HOST = "counted_device", "counted_host"
"""Names of the backends in place of NCCL and gloo."""
SAVING_THREAD = "checkpoint"
LOOKS = ("stat", "lstat")
OPENS = ("open", "os.scandir", "os.listdir")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir")


@dataclass
class Ledger:
    """Counts by phase and kind."""

    phase: str = "none"
    counts: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    calls: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Collectives by phase and `<name> of <ranks>`."""
    groups: list[CountedGroup] = field(default_factory=list)
    folder: Path | None = None
    """Where files count."""
    silent: bool = False

    def add(self, kind: str, amount: int = 1) -> None:
        if not self.silent:
            self.counts[self._here()][kind] += amount

    def add_call(self, name: str, ranks: int, sent: float) -> None:
        self.add("collectives")
        self.add("bytes", round(sent))
        self.calls[self._here()][f"{name} of {ranks}"] += 1

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """For what the simulation itself does in place of other ranks."""
        before, self.silent = self.silent, True
        try:
            yield
        finally:
            self.silent = before

    def connections(self, kind: str) -> int:
        """That the groups of a kind hold open."""
        return sum(group.connections() for group in self.groups if group.kind == kind)

    def _here(self) -> str:
        return "save" if threading.current_thread().name == SAVING_THREAD else self.phase


class CountedGroup(dist.ProcessGroup):
    """A process group of ranks of which only this one is there."""

    def __init__(self, kind: str, rank: int, size: int, ledger: Ledger, *, lazy: bool) -> None:
        super().__init__(rank, size)
        self.kind, self.own_rank, self.ranks, self.ledger, self.lazy = kind, rank, size, ledger, lazy
        self.used: set[str] = set()
        ledger.groups.append(self)
        ledger.add("groups")

    def connections(self) -> int:
        """gloo connects each rank of a group with each when the group is made, or where it connects lazily, when they
        have something to send: a ring has 2 neighbours, a tree or a barrier log2 of the ranks. NCCL connects at the
        first collective: a ring, and a binary tree of 3."""
        others = self.ranks - 1
        if self.kind == DEVICE:
            return min(others, 5) if self.used else 0
        if not self.lazy:
            return others
        ring = 2 if self.used & {"all_reduce", "all_gather", "reduce_scatter"} else 0
        tree = 2 * ceil(log2(max(self.ranks, 2))) if self.used & {"broadcast", "barrier"} else 0
        star = (others if self.own_rank == 0 else 1) if "reduce" in self.used else 0
        return min(others, ring + tree + star)

    def getBackendName(self) -> str:
        return self.kind

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:
        for tensor in tensors:
            if tensor.shape[:1] == (self.ranks,) and tensor.dtype == torch.uint8:
                # Bytes of which each rank fills a row: all fill in the same.
                tensor.copy_(tensor[self.own_rank].clone().expand_as(tensor))
            if tensor.dtype == torch.int64 and tensor.dim() == 1:
                # Digests of other shards, each followed by its complement: 0 and -1.
                missing = tensor == torch.iinfo(torch.int64).min
                tensor.masked_scatter_(missing, torch.arange(len(tensor)).remainder(2).neg())
        return self._count("all_reduce", tensors, 2 * self._share(), tensors)

    def broadcast(self, tensors: Any, opts: Any = None) -> Any:
        return self._count("broadcast", tensors, 1.0, tensors)

    def reduce(self, tensors: Any, opts: Any = None) -> Any:
        return self._count("reduce", tensors, 1.0, tensors)

    def barrier(self, opts: Any = None) -> Any:
        return self._count("barrier", [], 0.0, None)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for several, own in zip(outputs, inputs, strict=True):
            for output in several:
                output.copy_(own)
        return self._count("all_gather", outputs[0], self._share(), outputs)

    def _allgather_base(self, output: Any, own: Any, opts: Any = None) -> Any:
        output.view(self.ranks, -1).copy_(own.reshape(1, -1).expand(self.ranks, -1))
        return self._count("all_gather", [output], self._share(), output)

    def _reduce_scatter_base(self, output: Any, whole: Any, opts: Any = None) -> Any:
        output.view(-1).copy_(whole.view(self.ranks, -1)[self.own_rank])
        return self._count("reduce_scatter", [whole], self._share(), output)

    all_gather_single, reduce_scatter_single = _allgather_base, _reduce_scatter_base

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        for output, own in zip(outputs, inputs, strict=True):
            work = self._allgather_base(output, own)
        return work

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def _share(self) -> float:
        return (self.ranks - 1) / self.ranks

    def _count(self, name: str, tensors: Any, factor: float, result: Any) -> Any:
        sent = sum(tensor.numel() * tensor.element_size() for tensor in tensors) * factor
        self.ledger.add_call(name, self.ranks, sent)
        self.used.add(name)
        future: Future = Future()
        future.set_result(result)
        return torch._C._distributed_c10d._create_work_from_future(future)


class CountedStore(dist.Store):
    """Where the ranks meet: every other rank has been here already.

    told: what other ranks have set, by the end of the key; a number that ranks count together is that of all of them.
    """

    def __init__(self, ledger: Ledger, world_size: int, told: dict[str, str]) -> None:
        super().__init__()
        self._ledger, self._world_size, self._told = ledger, world_size, told
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._ledger.add("store_operations")
        self._values[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str) -> bytes:
        self._ledger.add("store_operations")
        for end, value in self._told.items():
            if key not in self._values and key.endswith(end):
                return value.encode()
        return self._values.get(key, b"")

    def add(self, key: str, amount: int) -> int:
        self._ledger.add("store_operations")
        return 0 if amount == 0 else self._world_size - 1

    def wait(self, *_: Any) -> None:
        self._ledger.add("store_operations")

    def check(self, keys: list[str]) -> bool:
        self._ledger.add("store_operations")
        return all(key in self._values for key in keys)

    def set_timeout(self, _: Any) -> None: ...


@contextlib.contextmanager
def counted_world(ledger: Ledger) -> Iterator[None]:
    """Groups, and files below `ledger.folder`, are counted. Once per process: hooks of the interpreter stay."""
    new_group = dist.new_group

    def counted_new_group(*arguments: Any, backend: str | None = None, **settings: Any) -> Any:
        ledger.add("calls_for_groups")
        return new_group(*arguments, backend=HOST if backend == "gloo" else backend, **settings)

    def maker(kind: str) -> Callable:
        def make(store: Any, rank: int, size: int, timeout: Any) -> CountedGroup:
            lazy = os.environ.get("TORCH_GLOO_LAZY_INIT") == "1"
            return CountedGroup(kind, rank, size, ledger, lazy=lazy)

        return make

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for kind, events in (("files_opened", OPENS), ("files_changed", CHANGES)):
            if event in events and arguments and _is_below(ledger.folder, arguments[0]):
                ledger.add(kind)

    for kind in (DEVICE, HOST):
        dist.Backend.register_backend(kind, maker(kind), devices=["cpu"])
    sys.addaudithook(hook)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(dist, "new_group", counted_new_group))
        for name in LOOKS:
            stack.enter_context(patch.object(os, name, _looking(getattr(os, name), ledger)))
        yield


def _looking(function: Callable, ledger: Ledger) -> Callable:
    def look(path: Any, *arguments: Any, **settings: Any) -> Any:
        if _is_below(ledger.folder, path):
            ledger.add("files_looked_at")
        return function(path, *arguments, **settings)

    return look


def _is_below(folder: Path | None, path: Any) -> bool:
    return folder is not None and isinstance(path, str | os.PathLike) and str(path).startswith(str(folder))
