"""A trainer on random tokens, without files: what the benchmarks of the training step share."""

from __future__ import annotations

import time

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.data import BatchLoader
from megasparse.gpu_check.random_run import RandomTokens, open_trainer
from megasparse.training.loop import Trainer

__all__ = ["MODELS", "SIZES", "RandomTokens", "benchmark_config", "open_trainer", "seconds_per_step"]

MODELS = {
    "quickstart": ["model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=4"],
    "gpt2-small-width": ["model.num_layers=4", "model.hidden_size=768", "model.num_attention_heads=12"],
    "gpt2-xl-width": ["model.num_layers=4", "model.hidden_size=1600", "model.num_attention_heads=25"],
}
# (sequence length, vocabulary) where they are not named.
SIZES = {"quickstart": (256, 2048), "gpt2-small-width": (1024, 50257), "gpt2-xl-width": (1024, 50257)}
COMMON = ["model.seq_length=256", "model.vocab_size=2048", "model.bias=false", "train.trackers=[]"]


def benchmark_config(model: str, *overrides: str) -> RunConfig:
    return load_config([], [*COMMON, *MODELS[model], *overrides])


def seconds_per_step(trainer: Trainer, loader: BatchLoader, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        trainer.train_step(loader)
    # The last step ends on the host before it ends on the device.
    trainer.state.ledger.seconds.settle()
    return (time.perf_counter() - started) / steps
