"""The methods by name: what each wants to know of a layer's inputs, and how it prunes the layer.

    method = method_of(settings)
    weight, units = method.prune(LayerTask(weight, statistic, pattern, available, count, settings))

A new one is a function and a line in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megasparse.pruning.criteria import magnitude, wanda
from megasparse.pruning.patterns import Pattern
from megasparse.pruning.sds import sparse_dense_sparse
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


def method_of(settings: PruneSettings) -> PruningMethod:
    """The method that the settings name, with SDS around it where they ask for that."""
    method = METHODS[settings.method]
    return PruningMethod(partial(_twice, method), InputGram) if settings.sds else method


def _twice(method: PruningMethod, task: LayerTask) -> tuple[Tensor, Tensor]:
    gram, penalty = task.inputs, task.settings.sds_penalty_or_default
    assert gram is not None
    # What the method itself would have collected.
    inputs = None if method.statistic is None else gram if method.statistic is InputGram else gram.diagonal()
    return sparse_dense_sparse(
        lambda weight: method.prune(replace(task, weight=weight, inputs=inputs)),
        task.weight,
        gram,
        task.pattern,
        task.available,
        penalty=penalty,
    )
