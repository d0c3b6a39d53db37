"""The stages of a run that grows in depth (section `stacking`): a small model, then the whole one.

    growth_step(config)                     # the step at which the layers are copied; None: there is one stage only
    small_stage(config).model.num_layers    # that of the first stage
    original("layers.5.mlp.up.weight", 2)   # "layers.1.mlp.up.weight"

This is G_stack of Du et al. 2024 (arXiv 2405.15319): layer j of the whole model begins as a copy of layer j mod n of
the small one, which has n layers. Both stages are one run: schedules go by `train.steps`, data go on in their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megasparse.config.schema import PatternOverride, RunConfig, StackingConfig

LAYER = re.compile(r"(?<![^/])layers\.(\d+)\.")
"""Beginning of the name of a parameter or a layer in a block; in the key of a saved topology after a `/`."""


def growth_step(config: RunConfig) -> int | None:
    """Finished steps at which the layers are copied; None where the run begins with the whole model."""
    stacking = config.stacking
    return None if stacking.num_layers is None else round(stacking.until * config.train.steps)


def small_stage(config: RunConfig) -> RunConfig:
    """The configuration of the first stage, but for how long it lasts."""
    num_layers = config.stacking.num_layers
    assert num_layers is not None, "the run has no small model"
    return with_layers(config, num_layers)


def stages(config: RunConfig) -> list[RunConfig]:
    """The configurations of the stages of a run, one or two."""
    return [config] if growth_step(config) is None else [small_stage(config), config]


def steps_of(stage: RunConfig) -> tuple[int, int]:
    """The first step of a stage and the one after its last."""
    growth, steps = growth_step(stage) or 0, stage.train.steps
    return (0, growth) if is_small(stage) else (growth, steps)


def is_small(config: RunConfig) -> bool:
    """Whether it is the configuration of a first stage: none that a user may give has so few layers."""
    return config.model.num_layers == config.stacking.num_layers


def is_of_small(config: RunConfig, saved_model: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of the small model. saved_model: section `model`, as it was saved."""
    small = config.stacking.num_layers
    return small is not None and saved_model.get("num_layers") == small


def stage_of(config: RunConfig, saved_model: Mapping[str, Any]) -> RunConfig:
    """The configuration of the stage that a checkpoint is of."""
    return small_stage(config) if is_of_small(config, saved_model) else config


def with_layers(config: RunConfig, num_layers: int) -> RunConfig:
    """The same with fewer layers, or with more of which each follows the exceptions of attention of its original."""
    before = config.model.num_layers

    def fitted(override: PatternOverride) -> PatternOverride:
        if override.every is None and override.layers is None:
            return override
        named = set(override.layer_numbers(before))
        layers = [layer for layer in range(num_layers) if layer % before in named]
        return override.model_copy(update={"layers": layers, "every": None, "first": 0})

    overrides = [fitted(override) for override in config.attention.overrides]
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_layers": num_layers}),
            "attention": config.attention.model_copy(update={"overrides": overrides}),
        }
    )


def without_stacking(config: RunConfig) -> RunConfig:
    """For a model that is no longer in its run."""
    return config.model_copy(update={"stacking": StackingConfig()})


def original(name: str, num_layers: int) -> str:
    """The name in a model of so many layers of what `name`, of a parameter, a layer or a mask, is a copy of."""
    return LAYER.sub(lambda found: f"layers.{int(found[1]) % num_layers}.", name)


def layer_number(name: str) -> int | None:
    """The number of the block that a parameter, a layer or a mask is in; None: it is in none."""
    found = LAYER.search(name)
    return None if found is None else int(found[1])


def copies(name: str, small: int, num_layers: int) -> list[str]:
    """The names of all copies of a name of the small model; itself alone where it is of no layer."""
    number = layer_number(name)
    if number is None:
        return [name]
    return [LAYER.sub(f"layers.{layer}.", name) for layer in range(number, num_layers, small)]
