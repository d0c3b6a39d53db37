"""Pruning a model folder, block by block.

    prune(PruneSettings(model=..., output=..., method="sparsegpt", density=0.5, calibration="text.txt"), environment)

For each block: run the calibration windows through it and collect what the method wants to know of its layers'
inputs; prune its layers, all by the inputs that the unpruned block gives; run the windows through the pruned block, for
the next one to read. Memory holds one block, statistics of its layers and one window; windows between blocks lie on
disk.

Ranks share windows and layers. Statistics are summed over them, so that the result is that of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from megasparse.checkpoint.store import CheckpointError
from megasparse.data.arguments import progress_bar
from megasparse.evaluation.run import sharing_ranks
from megasparse.launching import LaunchEnvironment
from megasparse.layers import Linear
from megasparse.models.gpt import Block
from megasparse.monitoring.console import make_console
from megasparse.parallel import CommunicationGroup
from megasparse.pruning.budget import spread_counts, uniform_counts
from megasparse.pruning.calibrated_walk import CalibratedWalk, barrier
from megasparse.pruning.heavy_tails import eigenvalues, relative_sparsities, tail_exponent
from megasparse.pruning.methods import LayerTask, method_of
from megasparse.pruning.model_in_blocks import ModelInBlocks
from megasparse.pruning.output import write_pruned
from megasparse.pruning.patterns import zeroed
from megasparse.pruning.plan import PlannedLayer, PrunePlan, make_plan
from megasparse.pruning.reporting import Advance, print_block, print_layers, showing_progress
from megasparse.pruning.settings import PruneSettings
from megasparse.pruning.statistics import InputGram, InputStatistic, output_error
from megasparse.pruning.work_folder import LayerRecord, WorkFolder
from megasparse.sparsity.topology import pack_bits


def prune(settings: PruneSettings, environment: LaunchEnvironment) -> None:
    """Write the pruned model folder. Every rank calls it.

    Raises ValueError for what the user must mend, before any process group starts where that can be known then; the
    output folder is whole or absent. What was done before a failure of the system or a kill is gone on from.
    """
    plan = make_plan(settings)
    work = WorkFolder(settings.output, plan.fingerprint)
    if not settings.restart:
        work.check()
    console = make_console() if environment.rank == 0 else None
    with sharing_ranks(environment, settings.device) as (ranks, device):
        try:
            Pruner(plan, work, ranks, device, console).run()
        except CheckpointError:
            # The same model would fail again.
            work.remove()
            raise
        _finish(plan, work, ranks, console)


def _finish(plan: PrunePlan, work: WorkFolder, ranks: CommunicationGroup, console: Console | None) -> None:
    if ranks.rank == 0:
        total = 4 * sum(math.prod(plan.source.shape(name)) for name in plan.source.names)
        with progress_bar("writing", total) as progress:
            write_pruned(plan, work, progress)
        print_layers(console, plan.units, {name: work.record(name) for name in plan.layers})
        work.remove()
    barrier(ranks)


class Pruner:
    """The work between the plan and the output folder, as one rank does it."""

    def __init__(
        self,
        plan: PrunePlan,
        work: WorkFolder,
        ranks: CommunicationGroup,
        device: torch.device,
        console: Console | None = None,
    ) -> None:
        self.plan, self.work, self.ranks, self.device, self.console = plan, work, ranks, device, console
        self.method = method_of(plan.settings)
        self.model = ModelInBlocks(plan.source, device)
        self.walk = CalibratedWalk(self.model, plan.windows, ranks, device, work.inputs_file)

    def run(self) -> None:
        """Prune all blocks that are not done; their layers are in the work folder then."""
        if self.ranks.rank == 0:
            self.work.begin(self.plan.settings.restart)
        barrier(self.ranks)
        first = self.work.blocks_done
        if first and self.console is not None:
            self.console.print(f"going on at block {first + 1} of {self.model.num_blocks}", soft_wrap=True)
        counts = self.work.counts or self._counts()
        if first == 0:
            self.walk.embed()
            self._advance_to(0, counts)
        layers = len(self.plan.layers) // self.model.num_blocks + 1
        steps = (self.model.num_blocks - first) * (2 * len(self.walk.own_samples) + layers)
        with showing_progress(self.console, steps) as advance:
            for number in range(first, self.model.num_blocks):
                self._prune_block(number, counts, advance)
                self._advance_to(number + 1, counts)

    def _counts(self) -> dict[str, int]:
        """Units to keep by layer; an n:m pattern says itself what is kept."""
        plan, density = self.plan, self.plan.settings.target_density
        if plan.settings.pattern.group:
            return dict.fromkeys(plan.layers, 0)
        if plan.settings.distribution == "uniform":
            return uniform_counts(plan.units, density)
        shares = relative_sparsities(self._alphas(), plan.settings.spread_or_default)
        return spread_counts(plan.units, density, {name: shares[layer.block] for name, layer in plan.layers.items()})

    def _alphas(self) -> list[float]:
        """Mean exponent of each block over its matrices; ranks share the blocks."""
        found = torch.zeros(self.model.num_blocks, dtype=torch.float64)
        for number in range(self.ranks.rank, self.model.num_blocks, self.ranks.size):
            layers = [layer for layer in self.plan.layers.values() if layer.block == number]
            exponents = [
                tail_exponent(eigenvalues(part.to(self.device)).cpu())
                for layer in layers
                for part in self.plan.source.tensor(layer.parameter).split(layer.parts)
            ]
            known = [exponent for exponent in exponents if math.isfinite(exponent)]
            found[number] = sum(known) / len(known) if known else math.nan
        return self.ranks.sum_(found).tolist()

    def _prune_block(self, number: int, counts: Mapping[str, int], advance: Advance) -> None:
        what = f"block {number + 1} of {self.model.num_blocks}"
        layers = {name: layer for name, layer in self.plan.layers.items() if layer.block == number}
        with self.model.block(number) as block:
            linear = {name: layer for name, layer in self.model.linear_layers(number).items() if name in layers}
            statistics = self._collect(number, block, linear, partial(advance, f"{what}: inputs"))
            for index, (name, layer) in enumerate(layers.items()):
                statistic = statistics.pop(name, None)
                total = None if statistic is None else statistic.total(self.ranks).to(self.device)
                del statistic
                if index % self.ranks.size == self.ranks.rank:
                    self._prune_layer(layer, linear[name].weight, total, counts[name])
                advance(f"{what}: pruning", 1)
            barrier(self.ranks)
            for name in layers:
                linear[name].weight.copy_(self.work.weight(name))
            if number + 1 < self.model.num_blocks:
                self.walk.run_on(number, block, partial(advance, f"{what}: outputs"))
        print_block(self.console, number, self.model.num_blocks, {name: self.work.record(name) for name in layers})

    def _collect(
        self, number: int, block: Block, linear: Mapping[str, Linear], advance: Callable[[int], None]
    ) -> dict[str, InputStatistic]:
        """Statistics of the inputs of these layers by name; none where the method needs none."""
        if self.method.statistic is None or not linear:
            return {}
        return self.walk.collect(number, block, linear, self.method.statistic, advance)

    def _prune_layer(self, layer: PlannedLayer, weight: Tensor, total: Tensor | None, count: int) -> None:
        """Put the pruned layer into the work folder.

        weight: float32 on the device. total: of the statistic that the method asks for.
        """
        settings, pattern = self.plan.settings, layer.pattern
        for what, tensor in (("weights", weight), ("inputs on the calibration tokens", total)):
            if tensor is not None and not tensor.isfinite().all():
                raise CheckpointError(f"layer {layer.name}: its {what} are not all finite; must be numbers")
        # By the values on disk: in another dtype they might look different.
        available = layer.available(self.plan.source.tensor(layer.parameter)).to(self.device)
        pruned, units = self.method.prune(LayerTask(weight, total, pattern, available, count, settings))
        pruned = zeroed(pruned, pattern.weights_of(units))
        error = math.nan
        if total is not None and self.method.statistic is InputGram:
            error = output_error(weight, pruned, total)
        dtype = self.plan.source.dtype(layer.parameter)
        record = LayerRecord(pack_bits(units), int(units.sum()), error)
        self.work.save_layer(layer.name, pruned.to(dtype).cpu().contiguous(), record)

    def _advance_to(self, number: int, counts: Mapping[str, int]) -> None:
        """So many blocks are done, on all ranks."""
        barrier(self.ranks)
        if self.ranks.rank == 0:
            self.work.save(number, counts)
            if number > 0:
                self.work.inputs_file(number - 1).unlink(missing_ok=True)
        barrier(self.ranks)
