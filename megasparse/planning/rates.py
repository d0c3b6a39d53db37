"""How fast a rank computes and sends: the roofline of its chip, lowered by assumptions or replaced by measurements.

rates = sheet_rates(cluster, "bf16", assumptions)
rates = probe.rates(cluster, "bf16", assumptions)             # this machine, see probe.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from megasparse.config.loader import ConfigError
from megasparse.cost.resources import BYTES
from megasparse.planning.assumptions import Assumptions
from megasparse.planning.cluster import Cluster
from megasparse.planning.sparse_products import SparseLimits
from megasparse.planning.workload import Product

Widths = tuple[int, int]


@dataclass(frozen=True)
class Rates:
    """FLOPs, bytes and seconds of one rank."""

    peak: float
    """FLOPs a second of the data sheet, or the largest measured."""
    dense: float
    """FLOPs a second of dense products, where `dense_by_widths` has no better number."""
    attention: float
    efficiency: float
    """Share of what `sparse_limits` allow that sparse products reach, where `curves` has no better number. With e the
    limit times this, the time of a product is density / e times the dense one."""
    streaming: float
    """Bytes a second of the optimizer and the loss."""
    elementwise: float
    """Bytes a second of norms, activations and residual sums."""
    launch_seconds: float
    launches_hidden: bool
    """Whether launches run beside the work (GPUs)."""
    link_efficiency: float
    link_latency: float
    network_latency: float
    sparse_layer_seconds: float = 0.0
    """Of the host for a block-sparse layer, beyond a dense one, forward and backward."""
    sparse_limits: SparseLimits | None = None
    """None: only the cores limit sparse products."""
    dense_by_widths: Mapping[Widths, float] = field(default_factory=dict)
    attention_by_pattern: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[Widths, Mapping[float, float]] = field(default_factory=dict)
    """Time over the dense time by density, measured, by widths."""

    def dense_rate(self, widths: Widths) -> float:
        return self.dense_by_widths.get(widths, self.dense)

    def attention_rate(self, pattern: str) -> float:
        return self.attention_by_pattern.get(pattern, self.attention)

    def relative_time(self, product: Product) -> float:
        """Time of a layer's product over that of the dense one."""
        if product.executed_density >= 1.0:
            return 1.0
        curve = self.curves.get(product.shape.widths)
        if curve is not None:
            return _between(curve, product.density)
        limit = 1.0 if self.sparse_limits is None else self.sparse_limits.efficiency(product)
        return product.density / (self.efficiency * limit)

    def send_seconds(self, cluster: Cluster, sent: float, collectives: float, size: int, stride: int = 1) -> float:
        """Seconds of so many collectives over `size` ranks in which each sends `sent` bytes in all.

        Latency grows with the logarithm of the ranks, as in trees.
        """
        if size == 1:
            return 0.0
        latency = self.network_latency if cluster.spans_nodes(size, stride) else self.link_latency
        hops = 2 * math.ceil(math.log2(size))
        return sent / (cluster.bandwidth(size, stride) * self.link_efficiency) + collectives * hops * latency


def sheet_rates(cluster: Cluster, precision: str, assumptions: Assumptions) -> Rates:
    """Raises ConfigError for a precision that the chip does not have."""
    chip = cluster.chip
    if precision not in chip.peak:
        raise ConfigError(
            f"train.precision: {precision} is not supported by {chip.title} in hardware; must be "
            f"{', '.join(sorted(chip.peak))}"
        )
    peak, memory = chip.peak[precision], chip.memory_bandwidth * assumptions["memory_efficiency"]
    dense, cache = peak * assumptions["dense_efficiency"], chip.memory_bandwidth * assumptions["cache_over_memory"]
    return Rates(
        peak=peak,
        dense=dense,
        attention=peak * assumptions["attention_efficiency"],
        efficiency=assumptions["kernel_efficiency"],
        streaming=memory,
        elementwise=memory,
        launch_seconds=assumptions["launch_us"] * 1e-6,
        launches_hidden=True,
        sparse_layer_seconds=assumptions["sparse_layer_us"] * 1e-6,
        sparse_limits=SparseLimits(dense, cache, memory, BYTES[precision]),
        link_efficiency=assumptions["link_efficiency"],
        link_latency=assumptions["link_latency_us"] * 1e-6,
        network_latency=assumptions["network_latency_us"] * 1e-6,
    )


def _between(curve: Mapping[float, float], density: float) -> float:
    """On straight lines between the points; beyond the last ones in proportion to the density, or flat."""
    densities, times = zip(*sorted(curve.items()), strict=True)
    if density > densities[-1]:
        return times[-1] * density / densities[-1]
    return float(np.interp(density, densities, times))
