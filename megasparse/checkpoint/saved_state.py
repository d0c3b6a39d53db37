"""One view of what is saved of a run, whatever form it has on disk: whole tensors, topology, position.

    saved = Checkpoint(folder)
    for name, shape in saved.shapes.items():
        weight = saved.tensor(name, "fp32")

``Checkpoint`` and ``CompactReader`` are such views, and so are states that are made while
they are read, such as a dense state seen through masks. Tools that write one form from another need no more than this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.sparsity.groups import layer_settings
from megasparse.sparsity.topology import unpack_bits

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq", "weight_steps")
KINDS = (WEIGHT, *MOMENTS)
ITEM_BYTES = {"weight_steps": 2}
"""Bytes of an entry by kind; float32 where nothing is said."""
LIVE, EVER = "active/", "ever/"
"""Beginnings of the topology's keys: units that are active, and those that have ever been."""
TABLE = "embedding.tokens.weight"
"""The parameter that a tied head shares."""


@dataclass(frozen=True)
class RunFacts:
    """What a run remembers besides tensors."""

    step: int
    model: dict[str, Any]
    """Section `model` of the configuration."""
    train_state: dict[str, Any]
    window_losses: list[float]
    """Each rank's sum of losses since the last logged step."""


class SavedState(Protocol):
    """Raises CheckpointError where what is asked for is missing or damaged."""

    @property
    def step(self) -> int:
        """Optimizer steps done; 0: there are no moments."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole parameters by name, in the order of the model."""

    @property
    def facts(self) -> RunFacts: ...

    def kinds(self, name: str) -> list[str]:
        """`fp32` and the moments that are kept of a parameter."""
        ...

    def tensor(self, name: str, kind: str) -> Tensor: ...

    def topology(self) -> dict[str, Tensor]:
        """Packed bits by `active/<layer>` and `ever/<layer>`; empty for a dense model."""
        ...

    def loss_scaler(self) -> Mapping[str, float]: ...


def weight_bytes(saved: SavedState) -> int:
    """What a bar of the progress counts: float32 of all parameters."""
    return 4 * sum(prod(shape) for shape in saved.shapes.values())


@dataclass(frozen=True)
class SparseParameter:
    """A parameter that is the weight of a sparse layer."""

    layer: str
    block_size: int
    shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        return self.shape[0] // self.block_size, self.shape[1] // self.block_size

    @property
    def num_units(self) -> int:
        return self.grid[0] * self.grid[1]

    def mask(self, bits: Tensor) -> Tensor:
        """Which units are active, bool in the shape of the grid, from packed bits. Raises CheckpointError."""
        try:
            return unpack_bits(bits, self.num_units).view(self.grid)
        except ValueError as error:
            raise CheckpointError(f"topology: layer {self.layer}: {error}") from None

    def inactive_entries(self, mask: Tensor) -> Tensor:
        """Entries of the weight that are inactive, bool in its shape."""
        return ~mask.repeat_interleave(self.block_size, 0).repeat_interleave(self.block_size, 1)


def sparse_parameters(
    config: RunConfig, shapes: Mapping[str, tuple[int, ...]], layers: Mapping[str, Any] | list[str]
) -> dict[str, SparseParameter]:
    """The parameters of these sparse layers, by name. Raises CheckpointError where they cannot be."""
    found = {}
    for layer in layers:
        name, settings = parameter_name(layer, shapes), layer_settings(config.sparsity, layer)
        if settings is None:
            raise CheckpointError(f"topology: layer {layer} has a mask, but by section sparsity it is dense")
        rows, columns = shapes[name]
        if rows % settings.block_size or columns % settings.block_size:
            raise CheckpointError(
                f"sparsity.block_size: {settings.block_size} does not divide {name} ({rows} x {columns})"
            )
        found[name] = SparseParameter(layer, settings.block_size, (rows, columns))
    return found


def parameter_name(layer: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The parameter that is the weight of a layer: a tied head's is the table of the embedding."""
    name = f"{layer}.weight"
    if name not in shapes and layer == "head":
        name = TABLE
    if len(shapes.get(name, ())) != 2:
        raise CheckpointError(f"topology: layer {layer} has a mask, but there is no matrix {layer}.weight")
    return name


def layers_of(topology: Mapping[str, Any]) -> list[str]:
    """The layers that have a mask, in the order of their names."""
    return sorted(key.removeprefix(LIVE) for key in topology if key.startswith(LIVE))


def moved(config: RunConfig, run_folder: Path) -> RunConfig:
    """The configuration of a run that lies in `run_folder` from now on, and that nothing stops before its end.

    Raises ConfigError where that is no name of a run.
    """
    values = config.model_dump(mode="json")
    values["run"] |= {"folder": str(run_folder.parent), "name": run_folder.name}
    values["train"] |= {"stop_after": None}
    return check_config(values)
