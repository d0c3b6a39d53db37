"""A model of which one transformer block at a time is in memory.

    model = ModelInBlocks(source, torch.device("cpu"))
    x = model.embed(tokens)
    with model.block(0) as block:
        x = block(x)

It is built without memory for its weights; those of a block come from their files when it is opened, in float32, and go
when it is closed. It runs in the attention patterns under which its weights were trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megasparse.config.schema import Pattern as AttentionPattern
from megasparse.config.schema import RunConfig, SparsityConfig
from megasparse.conversion.sources import Source
from megasparse.layers import Linear
from megasparse.models.build import build_model
from megasparse.models.gpt import GPT, Block
from megasparse.sparsity.schedule import PatternSchedule, pattern_at

TOKENS, POSITIONS = "embedding.tokens.weight", "embedding.positions.weight"


class ModelInBlocks:
    """The model of a source of weights, dense: inactive weights are zeros.

    source: `model.vocab_size` must be set, and there must be no low-rank branches.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        with torch.device("meta"):
            self.model = whole_model(source)

    @property
    def num_blocks(self) -> int:
        return len(self.model.layers)

    def linear_layers(self, block: int | None = None) -> dict[str, Linear]:
        """Linear layers by name, of one block or of all; in the order of the forward pass."""
        modules = self.model.layers if block is None else self.model.layers[block]
        return {module.name: module for module in modules.modules() if isinstance(module, Linear)}

    @torch.no_grad()
    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What the first block reads, float32 [B, T, C]; memory holds the rows of the table that occur."""
        ids, places = tokens_BT.unique(return_inverse=True)
        embedding = self.model.embedding
        embedding.tokens.weight = _constant(self.source.tensor(TOKENS)[ids])
        if embedding.positions is not None:
            embedding.positions.weight = _constant(self.source.tensor(POSITIONS))
        if self.model.config.tie_embeddings:
            # The table is looked up through the head that shares it.
            self.model.head.weight = embedding.tokens.weight
        return embedding(places).to(self.device)

    @contextmanager
    def block(self, number: int) -> Iterator[Block]:
        """A block with its weights on the device, without gradients."""
        block = self.model.layers[number]
        names = [name for name, _ in block.named_parameters()]
        # Copies: what is mapped from a file cannot be changed.
        weights = {
            name: self.source.tensor(f"layers.{number}.{name}").to(self.device, torch.float32, copy=True)
            for name in names
        }
        block.load_state_dict(weights, assign=True)
        with torch.no_grad():
            try:
                yield block
            finally:
                block.to("meta")


def whole_model(source: Source) -> GPT:
    """The model, dense, in its attention patterns, in evaluation mode; on the default device, weights not loaded."""
    config = source.config
    assert config.model.vocab_size is not None, "model.vocab_size is unset"
    model = build_model(_dense(config), config.model.vocab_size, drawn=False).eval()
    schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
    model.set_attention_patterns(schedule.layer_patterns(attention_pattern(source)))
    return model


def attention_pattern(source: Source) -> AttentionPattern:
    """That of the last training step."""
    config = source.config
    schedule = PatternSchedule(config.attention, config.model.num_layers, config.model.num_attention_heads)
    return pattern_at(config, int(source.facts.get("step", 0)), schedule)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)


def _dense(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update={"vocab_size_multiple": 1})
    return config.model_copy(update={"model": model, "sparsity": SparsityConfig(algorithm="dense")})
