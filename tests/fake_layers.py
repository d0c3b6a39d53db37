"""Layers and state without a model or an engine: what the controller needs, and nothing more."""

from __future__ import annotations

import torch

from megasparse.parallel import CommunicationGroup, ShardSpec
from megasparse.sparsity.state import StateFragment

BASE = [
    "model.num_layers=2", "train.steps=40", "sparsity.update_interval=4", "sparsity.block_size=4",
    "sparsity.warmup_end=0.25", "sparsity.restoration_start=0.6", "sparsity.restoration_end=0.85",
]  # fmt: skip


class FakeLayer:
    """What the controller needs of a layer."""

    def __init__(self, rows: int, columns: int, block_size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(rows, columns, generator=generator))
        self.mask = torch.ones(rows // block_size, columns // block_size, dtype=torch.bool)
        self.grid = ShardSpec(tuple(self.mask.shape))
        self.block_size, self.collect_dense_gradient, self.changes = block_size, False, 0

    def topology_changed(self, num_active: int | None = None) -> None:
        self.changes += 1


class FakeState:
    """Pieces of master weights, moments and gradients of one simulated rank; everything where there are no cuts."""

    def __init__(
        self, layers: dict[str, FakeLayer], parts: dict[str, tuple[int, int]] | None = None, ranks=None
    ) -> None:
        self.layers, self.parts = layers, parts
        self.shard = self.whole = ranks or CommunicationGroup()
        self.tensor_parallel = CommunicationGroup()
        self.state = {
            name: torch.stack([layer.weight.detach().reshape(-1).clone(), *torch.randn(3, layer.weight.numel())])
            for name, layer in layers.items()
        }

    def gradients_changed(self, names) -> None:
        assert set(names) <= set(self.layers)

    def fragments(self) -> dict[str, StateFragment]:
        found = {}
        for name, whole in self.state.items():
            start, stop = self.parts[name] if self.parts else (0, whole.shape[1])
            if stop > start:
                master, gradient, first, second = whole[:, start:stop]
                found[name] = StateFragment(start, master, gradient, {"exp_avg": first, "exp_avg_sq": second})
        return found

    def new_gradients(self, step: int) -> None:
        for number, whole in enumerate(self.state.values()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            whole[1] = torch.randn(whole.shape[1], generator=generator)

    def optimizer_step(self, topologies) -> None:
        for name, fragment in self.fragments().items():
            active = topologies[name].weights_slice(fragment.start, fragment.numel)
            fragment.master.sub_(0.1 * fragment.gradient * active)
            fragment.moments["exp_avg"].add_(fragment.gradient * active)
            fragment.moments["exp_avg_sq"].add_(active.float())
