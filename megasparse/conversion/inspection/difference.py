"""How two saved states differ: settings, steps, topologies layer by layer, weights tensor by tensor.

difference = compare(open_any(a), open_any(b))
difference.equal
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import VOCABULARY_TENSORS
from megasparse.checkpoint.saved_state import WEIGHT
from megasparse.config.loader import changed_settings
from megasparse.conversion.inspection.description import find_sparse
from megasparse.conversion.inspection.opening import Opened


@dataclass(frozen=True)
class LayerChange:
    """Units of a sparse layer, by where they are active."""

    layer: str
    both: int
    only_first: int
    only_second: int
    block_size: str = "alike"
    """`alike`, or how the two differ: then nothing is counted."""


@dataclass(frozen=True)
class TensorChange:
    name: str
    kind: str
    largest: float
    """Largest difference."""
    relative: float
    """Root of the sum of squared differences over that of the first tensor; infinite where that is 0."""
    entries: int
    """Entries that differ."""
    note: str = ""
    """Why they cannot be compared."""


@dataclass(frozen=True)
class Difference:
    settings: list[str]
    """Such as `train.steps: 600 -> 800`; of what both have a configuration of, or else of their models."""
    progress: dict[str, tuple[Any, Any]]
    """Step, optimizer steps and tokens of both, where they differ."""
    only_first: list[str]
    only_second: list[str]
    """Names of tensors."""
    layers: list[LayerChange]
    """All layers that are sparse in both, and those that are in one."""
    tensors: list[TensorChange]
    """Those that differ."""
    compared: int
    """Tensors that both have."""

    @property
    def equal(self) -> bool:
        """Whether tensors and topologies are the same; settings and progress may differ."""
        moved = any(layer.only_first or layer.only_second or layer.block_size != "alike" for layer in self.layers)
        return not (self.only_first or self.only_second or self.tensors or moved)


def compare(first: Opened, second: Opened) -> Difference:
    """Compare all tensors that both have, one at a time; rows that pad the vocabulary of one count for nothing."""
    a, b = first.saved, second.saved
    tensors, compared = [], 0
    for name in (name for name in a.shapes if name in b.shapes):
        kinds = [kind for kind in a.kinds(name) if kind in b.kinds(name)]
        for kind in kinds:
            change = _compare(name, kind, a.tensor(name, kind), b.tensor(name, kind))
            compared += 1
            tensors += [change] if change is not None else []
    own, other = _named_kinds(first), _named_kinds(second)
    return Difference(
        settings=_settings(first, second),
        progress={
            label: (x, y)
            for label, x, y in (
                ("step", a.facts.step, b.facts.step),
                ("optimizer steps", a.step, b.step),
                ("tokens", a.facts.train_state.get("tokens"), b.facts.train_state.get("tokens")),
            )
            if x != y
        },
        only_first=[name for name in own if name not in other],
        only_second=[name for name in other if name not in own],
        layers=_layers(first, second),
        tensors=tensors,
        compared=compared,
    )


def _compare(name: str, kind: str, a: Tensor, b: Tensor) -> TensorChange | None:
    if name in VOCABULARY_TENSORS:
        rows = min(a.shape[0], b.shape[0])
        a, b = a[:rows], b[:rows]
    if a.shape != b.shape:
        return TensorChange(name, kind, 0.0, 0.0, 0, f"shape {list(a.shape)} against {list(b.shape)}")
    a, b = a.to(torch.float32), b.to(torch.float32)
    differs = a.ne(b) & ~(a.isnan() & b.isnan())
    entries = int(differs.count_nonzero())
    if entries == 0:
        return None
    gap = torch.where(differs, a - b, torch.zeros_like(a))
    size = float(torch.linalg.vector_norm(a, dtype=torch.float64))
    distance = float(torch.linalg.vector_norm(gap, dtype=torch.float64))
    return TensorChange(name, kind, float(gap.abs().max()), distance / size if size else float("inf"), entries)


def _layers(first: Opened, second: Opened) -> list[LayerChange]:
    masks = [
        {sparse.layer: (sparse.block_size, mask) for sparse, mask in find_sparse(opened).values()}
        for opened in (first, second)
    ]
    changes = []
    for layer in sorted(masks[0] | masks[1]):
        if layer not in masks[0] or layer not in masks[1]:
            where = "the first" if layer in masks[0] else "the second"
            changes.append(LayerChange(layer, 0, 0, 0, f"sparse in {where} only"))
            continue
        (block_size, a), (other, b) = masks[0][layer], masks[1][layer]
        if block_size != other or a.shape != b.shape:
            changes.append(LayerChange(layer, 0, 0, 0, f"units of {block_size} against {other}"))
            continue
        both = int((a & b).count_nonzero())
        changes.append(LayerChange(layer, both, int(a.count_nonzero()) - both, int(b.count_nonzero()) - both))
    return changes


def _settings(first: Opened, second: Opened) -> list[str]:
    if first.config is not None and second.config is not None:
        return changed_settings(first.config, second.config)
    a, b = first.saved.facts.model, second.saved.facts.model
    if not a or not b:
        return []
    return [f"model.{name}: {a.get(name)} -> {b.get(name)}" for name in sorted(a | b) if a.get(name) != b.get(name)]


def _named_kinds(opened: Opened) -> list[str]:
    """Names of the weights, and of moments with their kind."""
    return [
        name if kind == WEIGHT else f"{name} ({kind})"
        for name in opened.saved.shapes
        for kind in opened.saved.kinds(name)
    ]
