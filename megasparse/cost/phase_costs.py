"""Bytes of a whole run: what a rank holds and sends in each stretch of it, between two changes of the phase or of the
capacity of packed storage (`sparsity.storage`).

    rows = phase_costs(config, vocab_size, controller, world_size)
    total_bytes(rows)["reduced"]                            # bytes that a rank sends to reduce gradients, over the run
    storage_stretches(config, rows)                         # joined where the capacity stays

Everything that follows the parameters, such as optimizer state and traffic, is asked of the model that the run builds
for the stretch, on the meta device.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import torch

from megasparse.config.schema import RunConfig
from megasparse.cost.resources import communication_per_rank, memory_per_rank, step_bytes
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.schedule import settings_at
from megasparse.sparsity.storage import plan_storage

SENT = ("reduced", "gathered", "tensor_parallel", "topology")
"""Kinds of bytes sent, each in a step of the mean: gradients, weights, tensor-parallel sums, topology updates."""


def phase_costs(
    config: RunConfig, vocab_size: int, controller: Controller, world_size: int, model: GPT | None = None
) -> list[dict[str, Any]]:
    """Rows in order: steps [start_step, end_step), phase, micro-batch; bytes of memory by kind, bytes sent in a step by
    kind (`sent`) and as ``communication_per_rank`` has them, bytes of optimizer state; and of the storage its rung,
    the density that there is room for, packed layers, blocks and parameters of a rank.

    controller: of rank 0's shard. model: that shard as the training methods have changed it, which may have frozen most
    of it; None: as it is built.
    """
    steps, schedule = config.train.steps, controller.schedule
    is_packed = config.sparsity.storage == "packed" and bool(controller.topologies)
    plan = plan_storage(config, controller) if is_packed else None
    changes = [first for first, _ in plan.changes] if plan else []
    models: dict[int, GPT] = {} if model is None or plan is not None else {0: model}
    rows = []
    for start, end in pairwise(sorted({0, *changes, *schedule.phase_starts(steps), steps})):
        rung = plan.at(start) if plan else 0
        room = plan.capacities(rung) if plan else {}
        if rung not in models:
            ranks = CommunicationGroup(0, controller.tensor_parallel.size)
            with torch.device("meta"):
                models[rung] = build_model(config, vocab_size, ranks, capacities=room)
        own, model = settings_at(config, schedule, start), models[rung]
        memory = memory_per_rank(own, model, world_size)
        rows.append(
            {
                "start_step": start,
                "end_step": end,
                "phase": schedule.phase(start / steps),
                "micro_batch_size": own.train.micro_batch_size,
                "memory": memory,
                "optimizer": memory.get("host_optimizer", memory["optimizer"]),
                "sent": sent_per_step(own, model, controller, world_size),
                "communication": communication_per_rank(own, model, controller, world_size),
                "rung": rung,
                "density": plan.rungs[rung] if plan else 1.0,
                "packed_layers": len(room),
                "blocks": sum(room.values()),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "whole_blocks": sum(controller.topologies[name].shard_units for name in room),
            }
        )
    return rows


def sent_per_step(config: RunConfig, model: GPT, controller: Controller, world_size: int) -> dict[str, float]:
    """Bytes that a rank sends in a step of the mean, by kind (``SENT``)."""
    average = communication_per_rank(config, model, controller, world_size)["topology_average"]
    return {**step_bytes(config, model, world_size), "topology": average}


def total_bytes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Bytes that a rank sends over the run, by kind, and `sent` in all; largest memory and optimizer state."""
    sums = {kind: sum((row["end_step"] - row["start_step"]) * row["sent"][kind] for row in rows) for kind in SENT}
    peaks = {"memory": max(row["memory"]["total"] for row in rows), "optimizer": max(row["optimizer"] for row in rows)}
    return {**sums, "sent": sum(sums.values()), **peaks}


def storage_stretches(config: RunConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of ``phase_costs`` joined where the capacity stays, each at its largest memory; empty where all storage
    is dense."""
    if config.sparsity.storage != "packed" or config.sparsity.algorithm == "dense":
        return []
    found = []
    for _, group in groupby(rows, key=lambda row: row["rung"]):
        alike = list(group)
        largest = max(alike, key=lambda row: row["memory"]["total"])
        found.append({**largest, "start_step": alike[0]["start_step"], "end_step": alike[-1]["end_step"]})
    return found
