"""A trainer on random tokens, without files: what the benchmarks of the training step share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.data import BatchLoader
from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.loop import Trainer
from megasparse.training.state import TrainState

MODELS = {
    "quickstart": ["model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=4"],
    "gpt2-small-width": ["model.num_layers=4", "model.hidden_size=768", "model.num_attention_heads=12"],
    "gpt2-xl-width": ["model.num_layers=4", "model.hidden_size=1600", "model.num_attention_heads=25"],
}
COMMON = ["model.seq_length=256", "model.vocab_size=2048", "model.bias=false", "train.trackers=[]"]


class RandomTokens:
    """Sample n, int64 [seq_length + 1], the same in every run."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size, self.seq_length = vocab_size, seq_length

    def __getitem__(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, self.vocab_size, self.seq_length + 1)


def benchmark_config(model: str, *overrides: str) -> RunConfig:
    return load_config([], [*COMMON, *MODELS[model], *overrides])


@contextmanager
def open_trainer(config: RunConfig, mesh: Mesh) -> Iterator[tuple[Trainer, BatchLoader]]:
    """A trainer that writes nothing, with its loader."""
    methods, engine = build_engine(config, config.model.vocab_size, mesh)
    data = RandomTokens(config.model.vocab_size, config.model.seq_length)
    trainer = Trainer(config, mesh, engine, methods, data, TrainState())
    with trainer.loader() as loader:
        yield trainer, loader
