"""What packed storage (`sparsity.storage`) needs in each stretch of a run between two changes of its capacity.

    for stretch in storage_stretches(config, vocab_size, controller, world_size): ...

Everything that follows the parameters, such as optimizer state and traffic, is asked of the model that the run builds
for the stretch, on the meta device.
"""

from __future__ import annotations

from typing import Any

import torch

from megasparse.config.schema import RunConfig
from megasparse.cost.resources import communication_per_rank, memory_per_rank
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup
from megasparse.sparsity.controller import Controller
from megasparse.sparsity.storage import plan_storage


def storage_stretches(
    config: RunConfig, vocab_size: int, controller: Controller, world_size: int
) -> list[dict[str, Any]]:
    """Steps, density that there is room for, blocks of a rank, and its memory and traffic in bytes; empty where all
    storage is dense. controller: of rank 0's shard."""
    if config.sparsity.storage == "dense" or not controller.topologies:
        return []
    plan, ranks, found = plan_storage(config, controller), CommunicationGroup(0, controller.tensor_parallel.size), []
    for start, end, rung in plan.stretches(config.train.steps):
        capacities = plan.capacities(rung)
        with torch.device("meta"):
            model = build_model(config, vocab_size, ranks, capacities=capacities)
        found.append(
            {
                "start_step": start,
                "end_step": end,
                "density": plan.rungs[rung],
                "packed_layers": len(capacities),
                "blocks": sum(capacities.values()),
                "whole_blocks": sum(controller.topologies[name].shard_units for name in capacities),
                "memory": memory_per_rank(config, model, world_size),
                "communication": communication_per_rank(config, model, controller, world_size),
            }
        )
    return found
