"""The section `layer_tying`: layers that share their weights (Dynamic Layer Tying; Hay and Wolf 2024, ICLR).

``layer_tying_conflicts`` says what it does not go with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from megasparse.config.section import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from megasparse.config.schema import RunConfig


class LayerTyingConfig(Section):
    mode: Literal["none", "fixed", "dynamic"] = "none"
    """fixed: layers share weights as `sources` says, all along; dynamic: a controller ties and unties them while they
    are trained."""
    sources: list[NonNegativeInt] | None = None
    """fixed: for each layer the layer whose weights it has, itself or an earlier one that has its own; all 0 is the
    sharing of ALBERT."""
    interval: PositiveInt = 4
    """Steps from one action of the controller to the next."""
    reward: Literal["loss", "perplexity"] = "loss"
    """Of an action, from the first batch that comes before the next one: minus its loss, or minus its perplexity, which
    is the same for all perplexities above 10; either within -10 and 10."""
    discount: Fraction = 0.99
    """Of later rewards."""
    lr: PositiveFloat = 1e-3
    """Learning rate of the network that values actions."""
    epsilon_decay: Fraction = 0.95
    """Share of random actions, 1 at first, is multiplied by this after each pass over the layers."""
    epsilon_floor: Fraction = 0.01
    """Least share of random actions."""
    hidden_size: PositiveInt = 128
    """Width of that network."""


def layer_tying_conflicts(config: RunConfig) -> list[str]:
    """What contradicts the section, one sentence each."""
    settings, num_layers = config.layer_tying, config.model.num_layers
    if settings.mode == "none":
        return []
    if (settings.mode == "fixed") != (settings.sources is not None):
        must = "unset" if settings.mode == "dynamic" else f"a list of {num_layers} layers"
        return [f"layer_tying.sources: {settings.sources} with layer_tying.mode {settings.mode}; must be {must}"]
    if settings.sources is not None and (wrong := _wrong_source(settings.sources, num_layers)):
        return [f"layer_tying.sources: {settings.sources}: {wrong}"]
    layered = [n for n, override in enumerate(config.attention.overrides) if override.layers or override.every]
    refused: dict[str, tuple[bool, object, str]] = {
        "model.num_layers": (num_layers < 2, num_layers, "at least 2"),
        # A tied layer computes with the patterns, masks, clusters, scales and entries of another one.
        **{f"attention.overrides.{n}": (True, "an exception for some layers", "one for all layers") for n in layered},
        "sparsity.algorithm": (config.sparsity.algorithm != "dense", config.sparsity.algorithm, "dense"),
        "switching.clusters": (config.switching.clusters is not None, config.switching.clusters, "unset"),
        "activation_sparsity.pattern": (config.activation_sparsity.pattern != "none", "2:4", "none"),
        "layer_dropping.theta": (config.layer_dropping.theta is not None, config.layer_dropping.theta, "unset"),
        "smt.density": (config.smt.density is not None, config.smt.density, "unset"),
        "spiel.density": (config.spiel.density is not None, config.spiel.density, "unset"),
        "model.residual_weight": (config.model.residual_weight != "none", config.model.residual_weight, "none"),
        "stacking.num_layers": (config.stacking.num_layers is not None, config.stacking.num_layers, "unset"),
        # A block that nobody uses is visited with one token, for which it would be traced anew.
        "train.compile": (config.train.compile == "blocks", "blocks", "none"),
    }
    return [
        f"{field}: {value} does not go with layer_tying.mode {settings.mode}; must be {must}, or layer_tying.mode none"
        for field, (is_refused, value, must) in refused.items()
        if is_refused
    ]


def _wrong_source(sources: list[int], num_layers: int) -> str | None:
    if len(sources) != num_layers:
        return f"{len(sources)} layers; must be {num_layers}, model.num_layers"
    for layer, source in enumerate(sources):
        if source > layer or sources[source] != source:
            allowed = [earlier for earlier in range(layer) if sources[earlier] == earlier]
            return f"layer {layer} cannot have those of layer {source}; must be one of {[*allowed, layer]}"
    return None
