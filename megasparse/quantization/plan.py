"""From settings to a plan: everything that a user can get wrong is refused here, before anything is written.

plan = make_plan(settings)
plan.description.bits, list(plan.layers)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megasparse.checkpoint.quantized import QUANTIZATION, Quantization
from megasparse.config.loader import ConfigError, check_values
from megasparse.conversion.sources import FolderSource
from megasparse.layers import Linear
from megasparse.pruning.model_in_blocks import ModelInBlocks
from megasparse.pruning.plan import check_mask, earlier_masks, folder_windows, layers_apart_from, open_model
from megasparse.quantization.settings import QuantizeSettings, check_settings


@dataclass(frozen=True)
class QuantizePlan:
    settings: QuantizeSettings
    source: FolderSource
    layers: Mapping[str, Linear]
    """Those that are quantised, by name, without weights."""
    windows: Tensor | None
    """Calibration tokens, int64 [samples, window]; None: there are none."""
    description: Quantization


def make_plan(settings: QuantizeSettings) -> QuantizePlan:
    """Raises ConfigError and CheckpointError for what cannot be quantised so."""
    check_settings(settings)
    source = open_model(settings.model, settings.output)
    if source.quantization is not None:
        raise ConfigError(f"--model: {settings.model} has a {QUANTIZATION}; must be a model that is not quantised yet")
    if settings.smoothing is not None and source.config.model.normalization_position == "post":
        raise ConfigError(
            f"--smoothing: {settings.smoothing:g}; must be left out for a model with model.normalization_position "
            "post: the residual stream, too, reads what its norms give"
        )
    layers = layers_apart_from("--keep-float", settings.keep_float, ModelInBlocks(source, torch.device("cpu")))
    _check_groups(settings, layers)
    masks = earlier_masks(source)
    for name in layers:
        check_mask(source, name, source.tensor(f"{name}.weight"), masks.get(name))
    windows = None
    if settings.calibration is not None:
        drawn = {"samples": settings.samples, "window": settings.window, "seed": settings.seed}
        windows = folder_windows(source, settings.calibration, **drawn)
    return QuantizePlan(settings, source, layers, windows, _description(settings, layers))


def _check_groups(settings: QuantizeSettings, layers: Mapping[str, Linear]) -> None:
    group = settings.group_or_default
    for name, layer in layers.items():
        if group is not None and layer.in_features % group:
            raise ConfigError(
                f"--group: {group} does not divide the {layer.in_features} inputs of layer {name}; must be a divisor "
                "of the inputs of every layer, or --keep-float that layer"
            )


def _description(settings: QuantizeSettings, layers: Mapping[str, Linear]) -> Quantization:
    values: dict[str, Any] = {
        "bits": settings.bits,
        "group": settings.group_or_default,
        "activations": settings.activations_or_default,
        "rounding": settings.rounding,
        "smoothing": settings.smoothing,
        "layers": {name: list(layer.partition.shape) for name, layer in layers.items()},
    }
    return check_values(Quantization, values)
