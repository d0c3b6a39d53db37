"""Scores stay in pieces: under ZeRO-3 no rank makes a tensor of scores, keys or positions as long as a whole layer."""

from __future__ import annotations

import torch
from engine_runs import Layout, advance, build, run_config
from harness import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Large enough that a piece of a layer is longer than the histograms of all layers, four times 2,048 numbers.
OVERRIDES = [
    "model.hidden_size=128",
    "model.num_layers=1",
    "sparsity.block_size=1",
    "sparsity.drop_score=magnitude_gradient",
    "sparsity.warmup_end=0.05",
]


class LargestAllocation(TorchDispatchMode):
    """The most entries that any operation put into new memory; masks, one byte per entry, counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {memory(tensor) for tensor in tensors((args, kwargs))}
        for tensor in tensors(result):
            if memory(tensor) in given:
                continue
            entries = tensor.untyped_storage().nbytes() // tensor.element_size()
            if tensor.element_size() == 1:
                self.masks = max(self.masks, entries)
            else:
                self.numbers = max(self.numbers, entries)
        return result


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure(mesh, stages: list[int]) -> list[dict[str, int]]:
    return [measure_stage(mesh, stage) for stage in stages]


def measure_stage(mesh, stage: int) -> dict[str, int]:
    """Two topology updates of a short run: the first drops from dense, the second keeps the topology moving."""
    engine, controller = build(mesh, run_config(OVERRIDES, Layout(data=2, zero=stage)))
    recorder, update = LargestAllocation(), controller.update_topology
    reports = []

    def recorded(access):
        with recorder:
            reports.append(update(access))

    controller.update_topology = recorded
    advance(mesh, engine, controller, 0, 7)
    assert len(reports) == 2 and all(report.dropped > 0 for report in reports) and reports[-1].grown > 0
    return {
        "numbers": recorder.numbers,
        "masks": recorder.masks,
        "largest_piece": max(fragment.numel for fragment in engine.state.fragments().values()),
        "largest_layer": max(topology.numel for topology in controller.topologies.values()),
    }


def test_no_rank_scores_a_whole_layer_under_zero_3() -> None:
    for partitioned, whole in run_distributed(measure, 2, [3, 0]):
        layer = partitioned["largest_layer"]
        assert partitioned["largest_piece"] == layer // 2
        assert partitioned["numbers"] <= partitioned["largest_piece"]
        # The mask of a layer is whole on every rank, a byte per weight.
        assert partitioned["masks"] <= layer
        # Where a rank holds whole layers the same recorder sees whole scores: it would not miss them.
        assert whole["numbers"] >= whole["largest_layer"] == layer
