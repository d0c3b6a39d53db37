"""The methods by name: what each wants to know of a layer's inputs, and how it prunes the layer.

    method = METHODS["wanda"]
    weight, units = method.prune(LayerTask(weight, statistic, pattern, available, count, settings))

A new one is a function and a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megasparse.pruning.criteria import magnitude, wanda
from megasparse.pruning.patterns import Pattern
from megasparse.pruning.settings import PruneSettings
from megasparse.pruning.sparsegpt import sparsegpt
from megasparse.pruning.statistics import InputGram, InputSquares, InputStatistic


@dataclass(frozen=True)
class LayerTask:
    """One layer, to be pruned."""

    weight: Tensor
    """float32 [out, in]."""
    inputs: Tensor | None
    """The total of the method's statistic; None: it wants none."""
    pattern: Pattern
    available: Tensor
    """Units that may be kept, bool."""
    count: int
    """Units to keep; an n:m pattern says that itself."""
    settings: PruneSettings


@dataclass(frozen=True)
class PruningMethod:
    prune: Callable[[LayerTask], tuple[Tensor, Tensor]]
    """The new weight, whose inactive entries may hold anything, and the units to keep."""
    statistic: Callable[[int, torch.device], InputStatistic] | None = None


def _by_magnitude(task: LayerTask) -> tuple[Tensor, Tensor]:
    return task.weight, magnitude(task.weight, task.pattern, task.available, task.count)


def _by_wanda(task: LayerTask) -> tuple[Tensor, Tensor]:
    assert task.inputs is not None
    norms = task.inputs.sqrt()
    # The largest in float64 first: float32 need not hold the sums of squares.
    norms = (norms / norms.max().clamp(min=torch.finfo(torch.float64).tiny)).float()
    return task.weight, wanda(task.weight, norms, task.pattern, task.available, task.count)


def _by_sparsegpt(task: LayerTask) -> tuple[Tensor, Tensor]:
    assert task.inputs is not None
    return sparsegpt(
        task.weight,
        task.inputs,
        task.pattern,
        task.available,
        task.count,
        damping=task.settings.damping_or_default,
        columns=task.settings.columns_or_default,
    )


METHODS = {
    "magnitude": PruningMethod(_by_magnitude),
    "wanda": PruningMethod(_by_wanda, InputSquares),
    "sparsegpt": PruningMethod(_by_sparsegpt, InputGram),
}
