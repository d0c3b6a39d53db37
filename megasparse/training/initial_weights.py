"""Puts the weights of a model folder, `train.init_from`, into a run that has not made a step.

load_initial_weights(config, methods, engine)        # on every rank

The optimizer is fresh and the step is 0. Weights lie whole in the folder, so that ranks and ZeRO stages may be any.
Master weights take them over exactly, whatever precision the model computes in, but for what a training method changes.
``initial_checks`` has looked at the folder before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder, fitted
from megasparse.checkpoint.packed import whole_numbers
from megasparse.config.schema import RunConfig
from megasparse.engine.restore import WEIGHT, apply_state, read_state
from megasparse.engine.training_engine import TrainingEngine
from megasparse.kernels.block_sparse import pack
from megasparse.methods.callback import TrainingMethod
from megasparse.parallel import ShardSpec, shard_spec_of
from megasparse.training.initial_checks import open_initial


def load_initial_weights(config: RunConfig, methods: Sequence[TrainingMethod], engine: TrainingEngine) -> None:
    """Put the folder's weights, and what methods find in it, into a fresh engine; every rank calls it."""
    folder = open_initial(config)
    # Frozen weights are no part of the engine, and an adapter begins with zeros.
    for method in methods:
        method.start_from(folder)
    if config.adapter_field is None:
        apply_state(engine, read_state(engine, _InitialState(folder, engine, methods)))
    for method in methods:
        method.check_state()


class _InitialState:
    """The folder as what ``read_state`` takes its tensors from."""

    step = 0

    def __init__(self, folder: ModelFolder, engine: TrainingEngine, methods: Sequence[TrainingMethod]) -> None:
        self._folder, self._methods = folder, methods
        layers = engine.packed_layers
        self.shapes = {
            name: layers[name].partition.shape if name in layers else shard_spec_of(parameter).shape
            for name, parameter in engine.model.named_parameters()
        }

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def fragment(self, name: str, kind: str, spec: ShardSpec, rank: int, start: int, numel: int) -> Tensor:
        return spec.shard(self._weight(name), rank).reshape(-1)[start : start + numel].clone()

    def blocks(self, name: str, kind: str, grid: ShardSpec, rank: int, numbers: Tensor) -> Tensor:
        weight = self._weight(name)
        return pack(weight, whole_numbers(grid, rank, numbers), weight.shape[1] // grid.shape[1])

    def _weight(self, name: str) -> Tensor:
        weight = fitted(name, self._folder.tensor(name), self.shapes[name]).to(torch.float32)
        for method in self._methods:
            weight = method.initial_weight(name, weight)
        return weight

    def loss_scaler(self) -> Mapping[str, float]:
        return {}
