"""A model of more layers from one of few, by the name map of ``config.stages``: layer j is a copy of layer j mod n.

grown, config = stack_layers(WeightsState(source), source.config, num_layers=8)
write_model_folder(grown, config, source.files, output)
"""

from __future__ import annotations

import torch

from megasparse.checkpoint.saved_state import SavedState
from megasparse.checkpoint.stacked import StackedState
from megasparse.config.loader import ConfigError
from megasparse.config.schema import RunConfig
from megasparse.config.stages import with_layers
from megasparse.layers import Linear
from megasparse.models.build import build_model
from megasparse.sparsity.groups import check_copied_settings


def stack_layers(saved: SavedState, config: RunConfig, num_layers: int) -> tuple[StackedState, RunConfig]:
    """`saved` with `num_layers` layers, its topology too where it has one, and its configuration.

    config: with `model.vocab_size`. Raises ConfigError where the layers are no multiple, or where section sparsity
    says something else of a copy than of its original.
    """
    small = config.model.num_layers
    if num_layers <= small or num_layers % small:
        raise ConfigError(
            f"--layers: {num_layers} is not 2, 3, ... times the {small} layers of the model; must be {2 * small}, "
            f"{3 * small}, {4 * small}, ..."
        )
    deep = with_layers(config, num_layers)
    assert config.model.vocab_size is not None
    with torch.device("meta"):
        model = build_model(deep, config.model.vocab_size)
    check_copied_settings(
        deep.sparsity, [name for name, layer in model.named_modules() if isinstance(layer, Linear)], small
    )
    return StackedState(saved, small, num_layers), deep
