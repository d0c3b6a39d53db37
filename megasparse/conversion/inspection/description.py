"""What is in a saved state, as plain values for a table or for JSON.

description = describe(open_any(path), read_values=False)
description.density, description.tensors[0].active
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.saved_state import (
    LIVE,
    WEIGHT,
    SparseParameter,
    layers_of,
    parameter_name,
    sparse_parameters,
)
from megasparse.checkpoint.store import CheckpointError
from megasparse.checkpoint.weights import computing_name, layer_sources
from megasparse.conversion.inspection.opening import Opened


@dataclass(frozen=True)
class Values:
    """What the numbers of a tensor are like."""

    zeros: float
    """Share of zeros."""
    largest: float
    """Largest magnitude among finite ones."""
    not_finite: int


@dataclass(frozen=True)
class TensorDescription:
    name: str
    shape: list[int]
    kinds: list[str]
    layer: str | None = None
    """Sparse layer that it is the weight of."""
    block_size: int | None = None
    active: int | None = None
    """Active units."""
    density: float | None = None
    values: Values | None = None


@dataclass(frozen=True)
class Description:
    kind: str
    folder: str
    step: int
    optimizer_steps: int
    tokens: int | None
    algorithm: str | None
    parameters: int
    """Those that layers share count once."""
    active_parameters: int
    density: float
    """Of the sparse matrices together; 1 where there are none."""
    moments: list[str]
    layout: dict[str, Any]
    model: dict[str, Any]
    tensors: list[TensorDescription]
    files: dict[str, tuple[int, str]]
    notes: list[str] = field(default_factory=list)


def describe(opened: Opened, *, read_values: bool = False) -> Description:
    """read_values: read every tensor to tell what its numbers are like; otherwise none is read."""
    saved = opened.saved
    sparse, tensors = find_sparse(opened), []
    for name, shape in saved.shapes.items():
        values = _values(saved.tensor(name, WEIGHT)) if read_values else None
        fields: dict[str, Any] = {}
        if name in sparse:
            found, mask = sparse[name]
            active = int(mask.count_nonzero())
            fields = {"layer": found.layer, "block_size": found.block_size, "active": active}
            fields["density"] = active / found.num_units
        tensors.append(TensorDescription(name, list(shape), saved.kinds(name), values=values, **fields))
    sources = layer_sources(saved) if isinstance(saved, Checkpoint) else None
    used = [row for row in tensors if computing_name(row.name, sources) == row.name]
    sizes = [(prod(row.shape), row.density) for row in used]
    total, all_sparse = sum(size for size, _ in sizes), sum(size for size, density in sizes if density is not None)
    inactive = sum(round(size * (1 - density)) for size, density in sizes if density is not None)
    return Description(
        kind=opened.kind,
        folder=str(opened.folder),
        step=saved.facts.step,
        optimizer_steps=saved.step,
        tokens=saved.facts.train_state.get("tokens"),
        algorithm=None if opened.config is None else opened.config.sparsity.algorithm,
        parameters=total,
        active_parameters=total - inactive,
        density=1 - inactive / all_sparse if all_sparse else 1.0,
        moments=sorted({kind for row in tensors for kind in row.kinds} - {WEIGHT}),
        layout=opened.layout,
        model=saved.facts.model,
        tensors=tensors,
        files=opened.files,
        notes=opened.notes,
    )


def find_sparse(opened: Opened) -> dict[str, tuple[SparseParameter, Tensor]]:
    """The sparse parameters by name, each with its mask: bool, the grid of its units.

    Without a configuration the unit is the one that the mask's length allows.
    """
    saved, topology = opened.saved, opened.saved.topology()
    if opened.config is not None:
        found = sparse_parameters(opened.config, saved.shapes, layers_of(topology))
    else:
        names = {layer: parameter_name(layer, saved.shapes) for layer in layers_of(topology)}
        found = {name: _guess(layer, saved.shapes[name], topology[f"{LIVE}{layer}"]) for layer, name in names.items()}
    return {name: (sparse, sparse.mask(topology[f"{LIVE}{sparse.layer}"])) for name, sparse in found.items()}


def _guess(layer: str, shape: tuple[int, ...], bits: Tensor) -> SparseParameter:
    rows, columns = shape
    units = [u for u in range(1, min(shape) + 1) if not rows % u and not columns % u]
    fitting = [u for u in units if -(-(rows // u * (columns // u)) // 8) == bits.numel()]
    if len(fitting) != 1:
        raise CheckpointError(f"topology: layer {layer}: without a config.yaml its unit cannot be told from its mask")
    return SparseParameter(layer, fitting[0], (rows, columns))


def _values(tensor: Tensor) -> Values:
    if tensor.numel() == 0:
        return Values(0.0, 0.0, 0)
    finite = torch.isfinite(tensor)
    largest = torch.where(finite, tensor, torch.zeros_like(tensor)).abs().max()
    zeros = 1 - int(tensor.count_nonzero()) / tensor.numel()
    return Values(zeros, float(largest), tensor.numel() - int(finite.count_nonzero()))
