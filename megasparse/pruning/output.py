"""The pruned model as a model folder: weights, topology, and a configuration that trains on with these masks.

write_pruned(plan, work, progress)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.saved_state import EVER, LIVE
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.sources import FolderSource, portable_config, write_weights
from megasparse.pruning.model_in_blocks import attention_pattern
from megasparse.pruning.plan import PrunePlan
from megasparse.pruning.work_folder import WorkFolder
from megasparse.sparsity.distribution import unit_target

PHASES = ("warm_up", "ultra_sparse", "restoration", "dense")


class _PrunedWeights:
    """Pruned layers from the work folder, everything else as it was."""

    def __init__(self, source: FolderSource, work: WorkFolder, layers: Mapping[str, str]) -> None:
        """layers: layer by parameter."""
        self._source, self._work, self._layers = source, work, layers

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def tensor(self, name: str) -> Tensor:
        layer = self._layers.get(name)
        return self._source.tensor(name) if layer is None else self._work.weight(layer)


def write_pruned(plan: PrunePlan, work: WorkFolder, progress: Callable[[int], None] = lambda done: None) -> None:
    """Write the output of a finished pruning; nothing is left of it after an error.

    progress: as in ``write_weights``.
    """
    source = plan.source
    records = {name: work.record(name) for name in plan.layers}
    counts = {name: record.num_active for name, record in records.items()}
    # Copies: safetensors refuses tensors that share memory.
    topology = {f"{kind}{name}": record.active.clone() for kind in (LIVE, EVER) for name, record in records.items()}
    config = pruned_config(plan, counts)
    write_weights(
        _PrunedWeights(source, work, {layer.parameter: name for name, layer in plan.layers.items()}),
        portable_config(config, source.files),
        plan.settings.output,
        facts=_facts(plan, counts),
        files=source.files,
        topology=topology,
        progress=progress,
    )


def pruned_config(plan: PrunePlan, counts: Mapping[str, int]) -> RunConfig:
    """The model's configuration with static masks of these counts of units.

    Attention keeps the pattern that the weights were trained under: by phases alone, static masks would be another
    phase.
    """
    config, settings = plan.source.config, plan.settings
    groups: list[dict[str, Any]] = [{"pattern": pattern, "dense": True} for pattern in settings.keep_dense]
    for layer in plan.units:
        if unit_target(settings.target_density, layer.units) != counts[layer.name]:
            groups.append({"pattern": layer.name, "density": counts[layer.name] / layer.units})
    values = config.model_dump(mode="json")
    values["sparsity"] = {
        "algorithm": "static",
        "density": settings.target_density,
        "block_size": settings.pattern.block_size,
        "groups": groups,
    }
    if config.attention.windows is None:
        pattern = attention_pattern(plan.source)
        values["attention"]["phases"] = {} if pattern == "full" else dict.fromkeys(PHASES, pattern)
    return check_config(values)


def _facts(plan: PrunePlan, counts: Mapping[str, int]) -> dict[str, Any]:
    """What is known of the model, and the prunings that it went through, in their order."""
    units = sum(layer.units for layer in plan.units)
    left_out = ("model", "calibration", "windows", "keep_zeros")
    record = {key: value for key, value in plan.fingerprint.items() if key not in left_out and value is not None}
    if plan.windows is not None:
        record |= {"samples": len(plan.windows), "window": plan.windows.shape[1], "seed": plan.settings.seed or 0}
    record["active_share"] = sum(counts.values()) / units
    return {**plan.source.facts, "prunings": [*plan.source.facts.get("prunings", []), record]}
