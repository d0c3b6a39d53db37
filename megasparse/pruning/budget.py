"""How many units each layer keeps, so that all of them together keep exactly what was asked for.

    counts = uniform_counts(layers, density)
    counts = spread_counts(layers, density, shares)           # shares: relative sparsities, layer by layer

Layers that an earlier mask has thinned cannot keep more than that mask has left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megasparse.config.loader import ConfigError
from megasparse.pruning.selection import apportion
from megasparse.sparsity.distribution import unit_target

LOWEST_SHARE = 0.1
"""No layer falls below this share of the density that was asked for; an exponent cannot remove a layer."""
HALVINGS = 100


@dataclass(frozen=True)
class LayerUnits:
    name: str
    units: int
    available: int
    """Those that an earlier mask has left."""


def check_density(layers: Sequence[LayerUnits], density: float) -> None:
    """Raise ConfigError where all layers together have fewer units left."""
    left, units = sum(layer.available for layer in layers), sum(layer.units for layer in layers)
    if unit_target(density, units) > left:
        raise ConfigError(
            f"--density: {density:g} is above the density that the model has already, {left / units:.4f}; must be "
            "below, pruning makes no weights active"
        )


def uniform_counts(layers: Sequence[LayerUnits], density: float) -> dict[str, int]:
    """The same density everywhere. Raises ConfigError where a layer has fewer units left."""
    check_density(layers, density)
    counts = {layer.name: unit_target(density, layer.units) for layer in layers}
    for layer in layers:
        if counts[layer.name] > layer.available:
            raise ConfigError(
                f"--density: {density:g} is above what layer {layer.name} has left, "
                f"{layer.available / layer.units:.4f}; must be at most that with uniform densities"
            )
    return counts


def spread_counts(layers: Sequence[LayerUnits], density: float, shares: Mapping[str, float]) -> dict[str, int]:
    """Sparsity of each layer in proportion to its share, between its bounds; the sum is met exactly.

    A layer keeps at least a tenth of `density`, and at most what is available. The factor of all shares is found by
    bisection, for the sum falls as it grows. Raises ConfigError where the layers have fewer units left.
    """
    check_density(layers, density)
    wanted = unit_target(density, sum(layer.units for layer in layers))

    def kept(factor: float) -> list[float]:
        return [
            min(max(1.0 - factor * shares[layer.name], LOWEST_SHARE * density) * layer.units, layer.available)
            for layer in layers
        ]

    low, high = 0.0, 1.0 / min(shares.values())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(kept(middle)) > wanted else (low, middle)
    return _rounded(layers, kept(low), wanted)


def _rounded(layers: Sequence[LayerUnits], kept: Sequence[float], wanted: int) -> dict[str, int]:
    """Whole numbers, at least 1 and at most what is available, that add up to `wanted`."""
    counts = [min(max(int(number), 1), layer.available) for layer, number in zip(layers, kept, strict=True)]
    missing = wanted - sum(counts)
    room = [layer.available - count if missing > 0 else count - 1 for layer, count in zip(layers, counts, strict=True)]
    changes = apportion(abs(missing), room)
    sign = 1 if missing > 0 else -1
    return {layer.name: count + sign * change for layer, count, change in zip(layers, counts, changes, strict=True)}
