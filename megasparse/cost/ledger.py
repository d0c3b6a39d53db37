"""The ledger: what the run cost, in FLOPs of three kinds, in seconds by part, and in bytes that a rank sent.

- dense: what the same model without sparsity would need (causal attention, every weight);
- algorithmic: active weights and active attention entries; the dense weight gradient of topology updates is counted;
- executed: what the kernels in use really compute, recomputation included.

A multiply-add is 2 FLOPs. Only matrix products count; norms, activations, softmax and embedding look-ups are below one
percent. The fifth product of fused attention kernels, which make the scores again in the backward pass, is not counted.
Under document masking the entries are still those of the pattern, so the counts are upper bounds there. In a run the
layers say which kernels compute them; a plan asks ``LayerKernels``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod

from megasparse.config.schema import Pattern, RunConfig
from megasparse.cost.layer_kernels import LayerKernels, saves_work
from megasparse.kernels.hybrid_attention import executed_entries
from megasparse.layers import Attention, Linear, SparseLinear, active_entries
from megasparse.models.gpt import GPT
from megasparse.utils.clocks import Add, Clock, DeviceClock, HostClock

PARTS = ("data", "forward", "backward", "optimizer", "topology")
STEP = "step"


@dataclass
class Flops:
    """FLOPs of a step, or summed over steps."""

    dense: float = 0.0
    algorithmic: float = 0.0
    executed: float = 0.0

    def add(self, other: Flops) -> None:
        self.dense += other.dense
        self.algorithmic += other.algorithmic
        self.executed += other.executed


@dataclass
class StepWork:
    """What of the dense work one optimizer step does; training methods fill it in."""

    densities: dict[str, float] = field(default_factory=dict)
    """Share of active weights of a sparse layer in the forward pass; layers left out are dense."""
    patterns: Sequence[tuple[Pattern, ...]] | None = None
    """Attention pattern of each query head of each layer; None: all `full`."""
    dense_gradient_layers: frozenset[str] = frozenset()
    """Sparse layers whose weight gradient is computed in full."""
    computed: dict[str, float] = field(default_factory=dict)
    """Share of the tokens for which a linear layer or an attention (by name) is computed; left out: 1."""
    low_rank_branches: bool = True
    """Whether those of the sparse layers are computed."""


class FlopCounter:
    """FLOPs of one optimizer step over the global batch, from what the step does and the kernels that do it."""

    def __init__(self, config: RunConfig, model: GPT, kernels: LayerKernels) -> None:
        self._config, self._model, self._kernels = config, model, kernels
        self._samples, self._length = config.train.global_batch_size, config.model.seq_length
        tokens = self._samples * self._length
        # FLOPs of one product (forward, input gradient or weight gradient): of the sparse layers when dense, and of
        # all else as it is computed, low-rank branches included.
        self._products: dict[str, int] = {}
        self._rest: dict[str, int] = {}
        whole = 0
        for name, layer in model.named_modules():
            if isinstance(layer, Linear):
                product = 2 * tokens * layer.in_features * layer.out_features
                branch = 2 * tokens * layer.low_rank * (layer.in_features + layer.out_features)
                whole += product + branch
                if isinstance(layer, SparseLinear):
                    self._products[name], self._rest[name] = product, branch
                else:
                    self._rest[name] = self._computed(layer) + branch
        self._attention = {name: layer for name, layer in model.named_modules() if isinstance(layer, Attention)}
        self._full = [("full",) * layer.num_heads for layer in self._attention.values()]
        self._attention_cost: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
        for name, heads in zip(self._attention, self._full, strict=True):
            whole += self._scores_and_sums(name, heads, active_entries)
        # A backward pass takes two products for each of the forward pass, in linear layers and in attention.
        self.dense = float(3 * whole)

    def _computed(self, layer: Linear) -> int:
        """FLOPs of one product of a layer whose weights are all active: over all ranks and micro-batches."""
        train, ranks = self._config.train, self._config.parallel.tensor_parallel_size
        once = sum(2 * prod(product) for product in layer.products(train.micro_batch_size * self._length))
        return train.global_batch_size // train.micro_batch_size * ranks * once

    def step(self, work: StepWork, kernels: Mapping[str, str] | None = None) -> Flops:
        """Count one step. kernels: those that compute the sparse layers, by layer; None: those that are planned."""
        algorithmic = executed = recomputed = 0.0
        for name, product in self._products.items():
            density, share = work.densities.get(name, 1.0), work.computed.get(name, 1.0)
            kernel = self._kernels.choice(name, density) if kernels is None else kernels[name]
            done = density if saves_work(kernel) else 1.0
            wants_dense = name in work.dense_gradient_layers
            algorithmic += share * product * (2 * density + (1.0 if wants_dense else density))
            executed += share * product * (2 * done + (1.0 if wants_dense else done))
            recomputed += share * product * done if name != "head" else 0.0
        for name, product in self._rest.items():
            if name in self._products and not work.low_rank_branches:
                continue
            cost = work.computed.get(name, 1.0) * product
            algorithmic += 3 * cost
            executed += 3 * cost
            # Blocks are recomputed, the head is not.
            recomputed += cost if name != "head" else 0.0
        patterns = self._full if work.patterns is None else work.patterns
        for name, heads in zip(self._attention, patterns, strict=True):
            share, (active, really) = work.computed.get(name, 1.0), self._attention_forward(name, tuple(heads))
            algorithmic += 3 * share * active
            executed += 3 * share * really
            recomputed += share * really
        if self._config.train.activation_recomputation:
            executed += recomputed
        return Flops(self.dense, algorithmic, executed)

    def _attention_forward(self, name: str, heads: tuple[str, ...]) -> tuple[int, int]:
        """Algorithmic and executed FLOPs of the scores and sums of one layer, forward."""
        if (name, heads) not in self._attention_cost:
            shape = {"dtype": self._kernels.dtype, "head_dim": self._config.model.head_dim}
            kernel, device = self._config.kernels.hybrid_attention, self._kernels.device
            executed = partial(executed_entries, kernel, device=device, planned=self._kernels.planned, **shape)
            both = [self._scores_and_sums(name, heads, entries) for entries in (active_entries, executed)]
            self._attention_cost[name, heads] = both[0], both[1]
        return self._attention_cost[name, heads]

    def _scores_and_sums(self, name: str, heads: tuple[str, ...], entries: Callable[..., int]) -> int:
        layer = self._attention[name]
        kinds = zip(heads, layer.offsets, strict=True)
        counted = sum(entries(pattern, self._length, layer.stride, offset=offset) for pattern, offset in kinds)
        # Two products, 2 FLOPs per entry and dimension each.
        return 4 * self._samples * counted * layer.head_dim


@dataclass
class Seconds:
    """Seconds of the training steps, by part; validation and checkpoints are not part of a step.

    On a CPU of the host's clock, on a GPU of its own: then they are complete after ``settle`` only, which waits for it.
    """

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    total: float = 0.0

    def __post_init__(self) -> None:
        self._clock: Clock = HostClock(self._add)

    def use_device(self, make_clock: Callable[[Add], Clock] = DeviceClock) -> None:
        """From now on measure what the device does instead of how fast it is given work."""
        self._clock = make_clock(self._add)

    def part(self, name: str) -> AbstractContextManager[None]:
        return self._clock.span(name)

    def step(self) -> AbstractContextManager[None]:
        return self._clock.span(STEP)

    def settle(self) -> None:
        self._clock.settle()

    def _add(self, name: str, seconds: float) -> None:
        if name == STEP:
            self.total += seconds
        else:
            self.parts[name] += seconds


@dataclass
class Ledger:
    """Totals since the start of the run, carried over restarts.

    sent: bytes that a rank has sent, by kind, as ``resources.step_bytes`` counts them for each step;
    topology updates are left out.
    """

    flops: Flops = field(default_factory=Flops)
    seconds: Seconds = field(default_factory=Seconds)
    sent: dict[str, float] = field(default_factory=dict)

    def add_sent(self, sent: Mapping[str, float]) -> None:
        for kind, count in sent.items():
            self.sent[kind] = self.sent.get(kind, 0.0) + count

    def state(self) -> dict:
        self.seconds.settle()
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping) -> Ledger:
        seconds = Seconds(dict(state["seconds"]["parts"]), state["seconds"]["total"])
        return cls(Flops(**state["flops"]), seconds, dict(state.get("sent", {})))

    def by_part(self) -> dict[str, float]:
        """Seconds by part; `other` is what no part claims."""
        self.seconds.settle()
        return {**self.seconds.parts, "other": self.seconds.total - sum(self.seconds.parts.values())}
