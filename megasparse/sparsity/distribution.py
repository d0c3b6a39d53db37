"""Density of each layer from the global target.

    densities = layer_densities(layers, density=0.1, distribution="erdos_renyi")

``uniform`` gives every layer the target. ``erdos_renyi`` makes the density of an n x m matrix proportional to
(n + m) / (n m) (Mocanu et al. 2018; Evci et al. 2020), capped at 1 with the excess shared among the others. In both
cases active weights over all layers add up to the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """What the distribution needs to know of a sparse matrix."""

    name: str
    out_features: int
    in_features: int
    depth: float | None = None
    """Place in the stack, 0 first block to 1 last block; None outside the stack (head)."""
    min_density: float | None = None
    """Own lowest density (a group override): such a layer stands outside the shared budget."""

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features


def layer_densities(
    layers: Sequence[LayerShape], density: float, min_density: float, distribution: str, depth_boost: float = 0.0
) -> dict[str, float]:
    """Density of each layer, in (0, 1].

    density: global target now. min_density: lowest global target of the run; a layer with an own lowest density d
    follows the same curve between d and 1.
    """
    shared = [layer for layer in layers if layer.min_density is None]
    own = {layer.name: layer.min_density for layer in layers if layer.min_density is not None}
    result = {name: _own_density(own_minimum, density, min_density) for name, own_minimum in own.items()}
    scale = _scale(shared, density, distribution, depth_boost)
    result.update({layer.name: min(1.0, scale * _preference(layer, distribution, depth_boost)) for layer in shared})
    return {layer.name: result[layer.name] for layer in layers}


def unit_target(density: float, num_units: int) -> int:
    """Active units of a layer at a density: the nearest whole number, at least one."""
    return min(num_units, max(1, math.floor(density * num_units + 0.5)))


def _own_density(own_minimum: float, density: float, min_density: float) -> float:
    if density >= 1.0 or min_density >= 1.0:
        return 1.0 if density >= 1.0 else own_minimum
    return own_minimum + (1.0 - own_minimum) * (density - min_density) / (1.0 - min_density)


def _preference(layer: LayerShape, distribution: str, depth_boost: float) -> float:
    n, m = layer.out_features, layer.in_features
    preference = (n + m) / (n * m) if distribution == "erdos_renyi" else 1.0
    if layer.depth is not None:
        preference *= 1.0 + depth_boost * abs(2.0 * layer.depth - 1.0)
    return preference


def _scale(layers: Sequence[LayerShape], density: float, distribution: str, depth_boost: float) -> float:
    """The factor at which min(1, factor x preference) uses the budget exactly."""
    if density >= 1.0:
        return math.inf
    budget = density * sum(layer.numel for layer in layers)
    # From the most preferred layer down: those that reach 1 leave the rest a smaller budget.
    order = sorted(layers, key=lambda layer: -_preference(layer, distribution, depth_boost))
    demand = [layer.numel * _preference(layer, distribution, depth_boost) for layer in order]
    remaining_demand = sum(demand)
    for layer, own_demand in zip(order, demand, strict=True):
        scale = budget / remaining_demand
        if scale * _preference(layer, distribution, depth_boost) <= 1.0:
            return scale
        budget -= layer.numel
        remaining_demand -= own_demand
    return math.inf
