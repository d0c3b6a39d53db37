"""Puts the weights of a model folder, `train.init_from`, into a run that has not made a step.

load_initial_weights(config, controller, engine)        # on every rank

The optimizer is fresh and the step is 0. Weights lie whole in the folder, so that ranks and ZeRO stages may be any.
Master weights take them over exactly, whatever precision the model computes in. ``initial_checks`` has looked at the
folder before.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megasparse.checkpoint.model_folder import ModelFolder, fitted
from megasparse.config.schema import RunConfig
from megasparse.engine.restore import WEIGHT, restore_state
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import shard_spec_of
from megasparse.sparsity.checks import check_invariant
from megasparse.sparsity.controller import Controller
from megasparse.training.initial_checks import is_used, open_initial, start_density, topology_density


def load_initial_weights(config: RunConfig, controller: Controller, engine: TrainingEngine) -> None:
    """Put the folder's weights, and its topology where it fits, into a fresh engine; every rank calls it."""
    folder = open_initial(config)
    if controller.topologies and is_used(topology_density(folder, controller), start_density(controller)):
        controller.load_state(folder.topology())
    restore_state(engine, _InitialState(folder, engine, controller))
    check_invariant(list(controller.topologies.values()), engine.state)


class _InitialState:
    """The folder as what ``restore_state`` takes its tensors from."""

    step = 0

    def __init__(self, folder: ModelFolder, engine: TrainingEngine, controller: Controller) -> None:
        self._folder = folder
        parameters = dict(engine.model.named_parameters())
        self.shapes = {name: shard_spec_of(parameter).shape for name, parameter in parameters.items()}
        names = {id(parameter): name for name, parameter in parameters.items()}
        # All ranks ask for all masks in the same order: they are put together from the ranks' shards.
        self._active = {
            names[id(layer.weight)]: (controller.whole_mask(name), layer.block_size)
            for name, layer in controller.layers.items()
            if controller.active_densities()[name] < 1.0
        }

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def tensor(self, name: str, kind: str) -> Tensor:
        weight = fitted(name, self._folder.tensor(name), self.shapes[name]).to(torch.float32)
        if name not in self._active:
            return weight
        grid, block_size = self._active[name]
        rows, columns = grid.shape
        blocks = weight.reshape(rows, block_size, columns, block_size).masked_fill(~grid[:, None, :, None], 0)
        return blocks.view(weight.shape)

    def loss_scaler(self) -> Mapping[str, float]:
        return {}
