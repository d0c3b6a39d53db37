"""How `sparsity.storage: auto` is resolved: packed where it saves more time than building the engine anew costs.

    choice = choose_storage(config, vocab_size, world_size, "cpu", saved=folder / "config.yaml")
    config = choice.applied_to(config)          # dense or packed
    choice.reason                               # for the plan

What is saved and what is lost are both bytes, of memory and of links, so that the answer depends little on how fast a
machine is. It is given once: a run that goes on keeps what it was started with, and ranks take that of the first one.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megasparse.config.checks import storage_obstacle
from megasparse.config.loader import ConfigError, load_config
from megasparse.config.schema import RunConfig
from megasparse.cost.layer_kernels import LayerKernels, saves_work
from megasparse.cost.phase_costs import phase_costs
from megasparse.cost.resources import communication_per_rank
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.schedule import settings_at
from megasparse.utils.format import format_seconds

GRADIENT_BYTES = 16
"""Of memory traffic per inactive entry and step that every rank has: the gradient is zeroed, written, added up, copied
for the reduction. With STATE_BYTES it is what a step of GPT-2-small width saves on one rank (benchmarks/results,
packed_step, EPYC: 3.2 to 4.9 ns per inactive entry, at 10 GB/s)."""
STATE_BYTES = 24
"""The same of master weight, moments and norm, which ZeRO divides over the data-parallel ranks."""
REBUILD_BYTES = 150
"""Of memory traffic per parameter of a rank each time that the engine is built anew: weights and moments to the host
and back, and the copies and zeros in between, some twelve passes over 12 bytes. With 54 million parameters, at
densities of 0.05 to 0.5, it took 0.8 to 3.2 s on one rank and 1.5 to 2.2 s on two (benchmarks/results, packed_step,
2026-11-28, EPYC, fp32), where this and what is sent say 1.3 and 1.6 s."""
MARGIN = 2.0
"""Seconds saved over seconds of rebuilding from which storage is packed."""
MINOR = 0.1
"""Share of the packed steps in which products may be slower than dense ones."""


@dataclass(frozen=True)
class Machine:
    """What a rank is taken to have: bytes a second of memory and links, seconds that any rebuilding takes.

    CPU: processes of one machine over gloo, as measured beside packed_step (0.6 GB/s); CUDA: an H100 and what it has of
    its node's adapters (planning/chips.yaml), less than their sheets say; its seconds of a rebuilding are assumed.
    """

    memory: float
    link: float
    rebuild_seconds: float


MACHINES = {"cpu": Machine(10e9, 1e9, 0.5), "cuda": Machine(2.5e12, 300e9, 5.0)}


@dataclass(frozen=True)
class StorageChoice:
    storage: str
    reason: str
    is_kept: bool = False
    """Whether a run that goes on had it before."""

    def applied_to(self, config: RunConfig) -> RunConfig:
        return config.model_copy(update={"sparsity": config.sparsity.model_copy(update={"storage": self.storage})})


def choose_storage(
    config: RunConfig, vocab_size: int, world_size: int, device: str, saved: Path | None = None
) -> StorageChoice:
    """Of a configuration with `sparsity.storage` auto. device: type of the device that trains. saved: configuration
    that the run was last started with, whose storage holds on."""
    if config.sparsity.algorithm == "dense":
        return StorageChoice("dense", "no matrix is sparse")
    if obstacle := storage_obstacle(config):
        return StorageChoice("dense", obstacle)
    if saved is not None and saved.is_file():
        with suppress(ConfigError):  # what is wrong with it is told when the run goes on
            before = load_config([saved]).sparsity.storage
            if before != "auto":
                return StorageChoice(before, "as the run was started", is_kept=True)
    packed, ranks = StorageChoice("packed", "").applied_to(config), config.parallel.tensor_parallel_size
    with torch.device("meta"):
        model = build_model(packed, vocab_size, CommunicationGroup(0, ranks))
    controller = Controller(packed, model.sparse_layers(), CommunicationGroup(0, ranks))
    rows = phase_costs(packed, vocab_size, controller, world_size)
    if not any(row["packed_layers"] for row in rows):
        return StorageChoice("dense", "the density is never low enough for it")
    if slow := _slow_products(packed, model, controller, rows, device):
        return StorageChoice("dense", slow)
    return _compare_seconds(packed, model, controller, rows, world_size, MACHINES[device])


def _slow_products(
    config: RunConfig, model: GPT, controller: Controller, rows: list[dict[str, Any]], device: str
) -> str | None:
    """Which packed layer dense products would be faster for: packed ones are never multiplied as matrices."""
    kernels, steps, slow, found = LayerKernels(config, model, device, planned=True), 0, 0, ""
    for row in (row for row in rows if row["packed_layers"]):
        count, densities = row["end_step"] - row["start_step"], controller.densities_for(min(row["density"], 1.0))
        losing = [name for name in controller.topologies if not saves_work(kernels.choice(name, densities[name]))]
        steps += count
        # A layer that is full by itself is not packed.
        losing = [name for name in losing if densities[name] < 1.0]
        if losing:
            slow += count
            found = f"dense products are faster for {losing[0]} at density {densities[losing[0]]:.2g}"
    return found if slow > MINOR * steps else None


def _compare_seconds(
    config: RunConfig,
    model: GPT,
    controller: Controller,
    rows: list[dict[str, Any]],
    world_size: int,
    machine: Machine,
) -> StorageChoice:
    replicas = world_size // config.parallel.tensor_parallel_size
    share = replicas if config.deepspeed.zero_stage >= 1 else 1
    entries, saved = sum(parameter.numel() for parameter in model.parameters()), 0.0
    for row in rows:
        own = settings_at(config, controller.schedule, row["start_step"])
        sent = communication_per_rank(own, model, controller, world_size)
        bytes_sent = sum(sent[name] - row["communication"][name] for name in ("data_parallel", "topology_average"))
        of_memory = (entries - row["parameters"]) * (GRADIENT_BYTES + STATE_BYTES / share)
        seconds = of_memory / machine.memory + bytes_sent / machine.link
        saved += seconds * (row["end_step"] - row["start_step"])
    gathered = 12 * entries * (replicas - 1) / replicas
    once = machine.rebuild_seconds + REBUILD_BYTES * entries / machine.memory + gathered / machine.link
    rebuilds = sum(a["rung"] != b["rung"] for a, b in pairwise(rows))
    pays = saved > MARGIN * once * rebuilds
    return StorageChoice(
        "packed" if pays else "dense",
        f"packing is expected to save {format_seconds(max(saved, 0.0))} of the run's steps and to cost "
        f"{format_seconds(once * rebuilds)} for building the engine anew {rebuilds} times"
        + ("" if pays else f"; it is taken from {MARGIN:g} times that"),
    )


def agree_on_storage(config: RunConfig, mesh: Mesh) -> RunConfig:
    """The storage of rank 0 on all ranks: each may have measured kernels of its own."""
    is_packed = config.sparsity.storage == "packed"
    agreed = bool(mesh.from_first(torch.tensor([int(is_packed)]))[0])
    return config if agreed == is_packed else StorageChoice("packed" if agreed else "dense", "").applied_to(config)
