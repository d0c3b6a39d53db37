"""The ledger: what the run cost, in FLOPs of three kinds and in seconds by part.

- dense: what the same model without sparsity would need (causal attention, every weight);
- algorithmic: active weights and active attention entries; the dense weight gradient of topology updates is counted;
- executed: what the kernels in use really compute, recomputation included.

A count is a linear function of the layers' densities, so its coefficients are taken from the model once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

from megasparse.config.schema import RunConfig
from megasparse.cost.flops import count_flops
from megasparse.cost.layer_kernels import LayerKernels
from megasparse.kernels.hybrid_attention import executed_entries
from megasparse.models.gpt import GPT
from megasparse.sparsity.controller import StepDecision

PARTS = ("data", "forward", "backward", "optimizer", "topology")


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


class FlopCounter:
    """FLOPs of one optimizer step over the global batch, from the step's densities, patterns and kernels."""

    def __init__(self, config: RunConfig, model: GPT, kernels: LayerKernels) -> None:
        self._config, self._model, self._kernels = config, model, kernels
        self._samples, self._length = config.train.global_batch_size, config.model.seq_length
        layers = model.sparse_layers()
        tokens = self._samples * self._length
        # FLOPs of one product (forward, input gradient or weight gradient) of each sparse layer when dense.
        self._products = {name: 2 * tokens * layer.in_features * layer.out_features for name, layer in layers.items()}
        empty = count_flops(model, self._samples, self._length, densities=dict.fromkeys(layers, 0.0))
        self._rest = empty.forward + empty.input_gradient + empty.weight_gradient
        # Blocks are recomputed, the head is not.
        head = 0 if "head" in layers else 2 * tokens * model.head.in_features * model.head.out_features
        self._recomputed_rest = empty.forward - head
        self.dense = float(count_flops(model, self._samples, self._length).total)
        self._attention: dict[tuple[tuple[str, ...], ...], tuple[int, int]] = {}

    def step(self, decision: StepDecision, densities: Mapping[str, float]) -> Flops:
        """Count one step. densities: of each sparse layer in the forward pass of this step."""
        algorithmic = executed = 0.0
        recomputed = float(self._recomputed_rest)
        for name, product in self._products.items():
            density = densities[name]
            work = self._kernels.executed_density(name, density)
            wants_dense = name in decision.dense_gradient_layers
            algorithmic += product * (2 * density + (1.0 if wants_dense else density))
            executed += product * (2 * work + (1.0 if wants_dense else work))
            recomputed += product * work if name != "head" else 0.0
        attention, attention_executed = self._attention_forward(tuple(decision.patterns))
        algorithmic += self._rest + 3 * attention
        executed += self._rest + 3 * attention_executed
        if self._config.train.activation_recomputation:
            executed += recomputed + attention_executed
        return Flops(self.dense, algorithmic, executed)

    def _attention_forward(self, patterns: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        """Algorithmic and executed FLOPs of the attention scores and sums, forward."""
        if patterns not in self._attention:
            count = partial(count_flops, self._model, self._samples, self._length, patterns=patterns)
            shape = {"dtype": self._kernels.dtype, "head_dim": self._config.model.head_dim}
            kernel, device = self._config.kernels.hybrid_attention, self._kernels.device
            entries = partial(executed_entries, kernel, device=device, planned=self._kernels.planned, **shape)
            algorithmic = count().attention_forward
            self._attention[patterns] = algorithmic, count(attention_entries=entries).attention_forward
        return self._attention[patterns]


@dataclass
class Seconds:
    """Wall-clock seconds of the training steps, by part; validation and checkpoints are not part of a step."""

    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    total: float = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - started

    @contextmanager
    def step(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.total += time.perf_counter() - started


@dataclass
class Ledger:
    """Totals since the start of the run, carried over restarts."""

    flops: Flops = field(default_factory=Flops)
    seconds: Seconds = field(default_factory=Seconds)

    def state(self) -> dict:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping) -> Ledger:
        return cls(Flops(**state["flops"]), Seconds(dict(state["seconds"]["parts"]), state["seconds"]["total"]))

    def by_part(self) -> dict[str, float]:
        """Seconds by part; `other` is what no part claims."""
        return {**self.seconds.parts, "other": self.seconds.total - sum(self.seconds.parts.values())}
