"""A trainer on random tokens, without a data set: for checks and benchmarks of the training step.

with open_trainer(config, mesh) as (trainer, loader):
    trainer.train_step(loader)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megasparse.config.schema import RunConfig
from megasparse.data import BatchLoader
from megasparse.parallel import Mesh
from megasparse.training.build_engine import Renewal, RunStorage, build_engine
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.loop import Trainer
from megasparse.training.state import TrainState


class RandomTokens:
    """Sample n, int64 [seq_length + 1], the same in every run."""

    def __init__(self, vocab_size: int, seq_length: int) -> None:
        self.vocab_size, self.seq_length = vocab_size, seq_length

    def __getitem__(self, number: int) -> np.ndarray:
        return np.random.default_rng(number).integers(0, self.vocab_size, self.seq_length + 1)


@contextmanager
def open_trainer(
    config: RunConfig, mesh: Mesh, checkpoint: Path | None = None
) -> Iterator[tuple[Trainer, BatchLoader]]:
    """A trainer that writes nothing, with its loader. checkpoint: folder from whose last checkpoint it goes on."""
    vocab_size, state = config.model.vocab_size, None
    assert vocab_size is not None, "there is no tokenizer to tell it"
    storage = RunStorage.of(config, vocab_size, mesh.tensor_parallel)
    capacities = None if storage is None else storage.plan.capacities(storage.plan.at(0))
    renewal = None if storage is None else Renewal(config, vocab_size, mesh, storage)
    methods, engine = build_engine(config, vocab_size, mesh, capacities=capacities)
    if checkpoint is not None:
        state = Checkpointer(checkpoint, config, mesh, engine, methods, storage).restore().state
        assert state is not None, f"no checkpoint in {checkpoint}"
    data = RandomTokens(vocab_size, config.model.seq_length)
    trainer = Trainer(config, mesh, engine, methods, data, state or TrainState(), renewal=renewal)
    with trainer.loader() as loader:
        yield trainer, loader
