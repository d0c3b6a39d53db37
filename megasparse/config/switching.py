"""The section `switching`: MLPs that are trained as mixtures of their own clusters of neurons for part of the run
(switchable sparse-dense learning; Zhang et al. 2024, arXiv 2410.03440)."""

from __future__ import annotations

from megasparse.config.section import Fraction, OpenFraction, PositiveInt, Section


class SwitchingConfig(Section):
    clusters: PositiveInt | None = None
    """Equal clusters that the neurons of each MLP are divided into; `model.activation` must be relu2. Unset: MLPs stay
    dense."""
    active: PositiveInt = 4
    """Clusters that a token passes through while MLPs are mixtures; over all shards."""
    shards: PositiveInt = 1
    """Equal pieces of an MLP that are clustered, and choose, each for themselves; a multiple of
    `parallel.tensor_parallel_size`, and a run goes the same way at each size that divides it."""
    threshold: Fraction = 0.9
    """Adjusted Rand index of two successive clusterings, in the mean over layers, from which on MLPs are mixtures."""
    interval: PositiveInt | None = None
    """Steps from one clustering to the next while MLPs are dense; unset: 1 % of `train.steps`."""
    period: PositiveInt | None = None
    """Steps that MLPs stay mixtures before they are dense again; unset: 10 % of `train.steps`."""
    share: OpenFraction = 0.5
    """Of the steps so far, the share with mixtures from which on no further period begins."""
    dense_end: Fraction = 0.1
    """Share of the steps, at the end of the run, in which MLPs are dense."""

    def interval_of(self, steps: int) -> int:
        return max(steps // 100, 1) if self.interval is None else self.interval

    def period_of(self, steps: int) -> int:
        return max(steps // 10, 1) if self.period is None else self.period
