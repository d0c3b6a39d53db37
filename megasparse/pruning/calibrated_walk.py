"""Calibration windows on their way through a model in blocks; what stands between two blocks lies on disk.

    walk = CalibratedWalk(model, windows, ranks, device, inputs_file)
    walk.embed()
    with model.block(0) as block:
        statistics = walk.collect(0, block, layers, InputGram, advance)
        walk.run_on(0, block, advance)                 # what block 1 reads

Ranks share the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megasparse.layers import Linear
from megasparse.models.gpt import Block
from megasparse.parallel import CommunicationGroup
from megasparse.pruning.model_in_blocks import ModelInBlocks
from megasparse.pruning.statistics import S, collecting
from megasparse.pruning.work_folder import ActivationFile


class CalibratedWalk:
    """windows: int64 [samples, window]; None: nothing is done. inputs_file: where the inputs of a block lie."""

    def __init__(
        self,
        model: ModelInBlocks,
        windows: Tensor | None,
        ranks: CommunicationGroup,
        device: torch.device,
        inputs_file: Callable[[int], Path],
    ) -> None:
        self.model, self.windows, self.ranks, self.device = model, windows, ranks, device
        self.inputs_file = inputs_file
        self.own_samples = range(ranks.rank, 0 if windows is None else len(windows), ranks.size)

    def embed(self) -> None:
        """What the first block reads."""
        if self.windows is None:
            return
        inputs = self._created(0)
        for sample in self.own_samples:
            inputs.write(sample, self.model.embed(self.windows[sample].unsqueeze(0)))

    def collect(
        self,
        number: int,
        block: Block,
        linear: Mapping[str, Linear],
        kind: Callable[[int, torch.device], S],
        advance: Callable[[int], None],
    ) -> dict[str, S]:
        """Statistics of the inputs of these layers of a block, by name."""
        with collecting(linear, kind) as found:
            for sample in self.own_samples:
                block(self.inputs(number, sample))
                advance(1)
        return found

    def run_on(self, number: int, block: Block, advance: Callable[[int], None]) -> None:
        """What the block gives is what the next one reads."""
        if self.windows is None:
            return
        outputs = self._created(number + 1)
        for sample in self.own_samples:
            outputs.write(sample, block(self.inputs(number, sample)))
            advance(1)

    def inputs(self, number: int, sample: int) -> Tensor:
        """What a block reads of a window, float32 [1, T, C]."""
        return self._activations(number).read(sample).to(self.device)

    def _created(self, number: int) -> ActivationFile:
        file = self._activations(number)
        if self.ranks.rank == 0:
            file.create()
        barrier(self.ranks)
        return file

    def _activations(self, number: int) -> ActivationFile:
        assert self.windows is not None
        samples, length = self.windows.shape
        return ActivationFile(self.inputs_file(number), (samples, length, self.model.model.config.hidden_size))


def barrier(ranks: CommunicationGroup) -> None:
    """Wait until all ranks have come here."""
    ranks.sum_(torch.zeros(1))
