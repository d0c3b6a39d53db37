"""The section `layer_dropping`: layers that are left out of a step (Zhang and He 2020, arXiv 2010.13369)."""

from __future__ import annotations

from math import exp, expm1

from megasparse.config.section import OpenFraction, PositiveFloat, Section


class LayerDroppingConfig(Section):
    theta: OpenFraction | None = None
    """Share that theta(t) = (1 - theta) exp(-gamma t) + theta falls to from 1. Block l of L takes part in step t with
    probability 1 - l / L (1 - theta(t)), and what it adds is divided by that. Unset: no layers are dropped."""
    gamma: PositiveFloat | None = None
    """How fast it falls, per step; unset: 100 / `train.steps`."""
    together: bool = False
    """Attention and MLP of a block are dropped together; false: each for itself."""

    def theta_at(self, step: float, steps: int) -> float:
        """theta(t) in step `step` (0-based) of a run of `steps`; 1 where no layers are dropped."""
        if self.theta is None:
            return 1.0
        return (1.0 - self.theta) * exp(-self._gamma(steps) * step) + self.theta

    def mean_theta(self, steps: int) -> float:
        """Over the steps of a run: the sum of a geometric series."""
        if self.theta is None:
            return 1.0
        gamma = self._gamma(steps)
        return (1.0 - self.theta) * expm1(-gamma * steps) / expm1(-gamma) / steps + self.theta

    def _gamma(self, steps: int) -> float:
        return 100.0 / steps if self.gamma is None else self.gamma
