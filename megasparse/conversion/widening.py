"""A model of a larger hidden size from a dense one, which computes the same.

    grown, config = widen(WeightsState(source), source.config, hidden_size=128)
    write_model_folder(grown, config, source.files, output)

The residual stream gets new channels, attention new heads of the same width, the MLP new units, each in proportion.
What writes into a new channel, and what reads a new head or unit, is 0; all other new entries are drawn, so that
gradients reach the zeros at once. RMS norms divide by a mean over more channels, of which the new ones are 0: their
weights and epsilon take the factor back. Layer norms cannot, for their mean would change the new channels.
Zero-initialised width growth is what MST's restoration does to a sparse model (width-zero of Du et al. 2024,
arXiv 2405.15319, where depth growth did better).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from itertools import accumulate
from math import gcd, sqrt

import torch
from torch import Tensor

from megasparse.checkpoint.saved_state import WEIGHT, RunFacts, SavedState
from megasparse.config.loader import ConfigError, check_config
from megasparse.config.schema import ModelConfig, RunConfig
from megasparse.models.build import build_model

ADDERS = ("attention.output.weight", "mlp.down.weight")
"""Projections that add to the residual stream."""


def widen(saved: SavedState, config: RunConfig, hidden_size: int) -> tuple[WidenedState, RunConfig]:
    """`saved` with a residual stream of `hidden_size` channels, and its configuration.

    config: of a dense model, with `model.vocab_size`. Raises ConfigError where it cannot be widened, or not to this.
    """
    narrow = config.model
    _check(saved, config, hidden_size)
    factor, rest = hidden_size / narrow.hidden_size, narrow.num_key_value_heads
    values = config.model_dump(mode="json")
    values["model"] |= {
        "hidden_size": hidden_size,
        "num_attention_heads": round(narrow.num_attention_heads * factor),
        "num_key_value_heads": None if rest is None else round(rest * factor),
        "ffn_hidden_size": round(narrow.mlp_width * factor),
        "normalization_epsilon": narrow.normalization_epsilon / factor,
    }
    wide = check_config(values)
    return WidenedState(saved, narrow, wide), wide


class WidenedState:
    """A ``SavedState`` of the wide model; one tensor is made at a time. It has neither moments nor masks.

    narrow: section `model` of what is saved. wide: the configuration of what it becomes.
    """

    step = 0

    def __init__(self, saved: SavedState, narrow: ModelConfig, wide: RunConfig) -> None:
        assert wide.model.vocab_size is not None
        self.saved, self.narrow, self.wide, self.seed = saved, narrow, wide.model, wide.run.seed
        with torch.device("meta"):
            model = build_model(wide, wide.model.vocab_size)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        # The vocabulary is padded in a model, and not in what is saved.
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (shape[0], *shapes[name][1:]) if name.startswith(("embedding.", "head.")) else shapes[name]
            for name, shape in saved.shapes.items()
        }

    @property
    def facts(self) -> RunFacts:
        # The model computes what it did, so what is known of its loss stays true.
        facts = self.saved.facts
        return RunFacts(facts.step, self.wide.model_dump(mode="json"), facts.train_state, facts.window_losses)

    def kinds(self, name: str) -> list[str]:
        return [WEIGHT]

    def topology(self) -> dict[str, Tensor]:
        return {}

    def loss_scaler(self) -> Mapping[str, float]:
        return self.saved.loss_scaler()

    def tensor(self, name: str, kind: str) -> Tensor:
        assert kind == WEIGHT, kind
        old, shape = self.saved.tensor(name, kind), self.shapes[name]
        rows = self._rows(name, old.shape[0])
        if name.endswith("norm.weight"):
            new = old.new_ones(shape)
            new[rows] = old
            # The mean of the squares falls by the share of the old channels.
            return new * sqrt(self.narrow.hidden_size / self.wide.hidden_size)
        if old.dim() == 1:
            new = old.new_zeros(shape)
            new[rows] = old
            return new
        new = old.new_zeros(shape) if name.startswith("embedding.") or name.endswith(ADDERS) else self._drawn(name, old)
        new[rows, : old.shape[1]] = old
        return new

    def _drawn(self, name: str, old: Tensor) -> Tensor:
        """New entries of a matrix that reads the residual stream: their channels are 0, or what reads their rows is."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return (torch.randn(self.shapes[name], generator=generator) * self.wide.init_std).to(old.dtype)

    def _rows(self, name: str, count: int) -> Tensor:
        """Where the rows of a saved parameter lie in the wide one: fused projections grow part by part."""
        if ".attention.qkv." in name:
            return _places(_qkv_parts(self.narrow), _qkv_parts(self.wide))
        if ".mlp.gate_up." in name:
            return _places([self.narrow.mlp_width] * 2, [self.wide.mlp_width] * 2)
        return torch.arange(count)


def _qkv_parts(model: ModelConfig) -> list[int]:
    heads = (model.num_attention_heads, model.key_value_heads, model.key_value_heads)
    return [count * model.head_dim for count in heads]


def _places(narrow: Iterable[int], wide: Iterable[int]) -> Tensor:
    starts = accumulate(wide, initial=0)
    return torch.cat([torch.arange(part) + start for part, start in zip(narrow, starts, strict=False)])


def _check(saved: SavedState, config: RunConfig, hidden_size: int) -> None:
    model = config.model
    if model.normalization != "rmsnorm":
        raise ConfigError(
            f"model.normalization: {model.normalization} takes the mean of all channels, so a wider model computes "
            "something else; must be rmsnorm"
        )
    if model.normalization_position == "post":
        raise ConfigError(
            "model.normalization_position: post normalises the residual stream itself, so a wider model computes "
            "something else; must be pre"
        )
    if saved.topology():
        raise ConfigError("--model: it has masks, which have no place in a wider model; must be a dense model")
    if config.attention.overrides:
        raise ConfigError("attention.overrides: patterns go by the number of heads; must be empty to be widened")
    counts = (model.hidden_size, model.num_attention_heads, model.key_value_heads, model.mlp_width)
    step = model.hidden_size // gcd(*counts)
    if hidden_size <= model.hidden_size or hidden_size % step:
        first = range(model.hidden_size + step, model.hidden_size + 4 * step, step)
        raise ConfigError(
            f"--hidden-size: {hidden_size} is not in proportion to the {model.hidden_size} channels, "
            f"{model.num_attention_heads} heads and {model.mlp_width} units of the model; must be "
            f"{', '.join(map(str, first))}, ..."
        )
