"""A trainer on random tokens, without files: what the benchmarks of the training step share."""

from __future__ import annotations

from megasparse.config.loader import load_config
from megasparse.config.schema import RunConfig
from megasparse.gpu_check.random_run import RandomTokens, open_trainer

__all__ = ["MODELS", "RandomTokens", "benchmark_config", "open_trainer"]

MODELS = {
    "quickstart": ["model.num_layers=4", "model.hidden_size=256", "model.num_attention_heads=4"],
    "gpt2-small-width": ["model.num_layers=4", "model.hidden_size=768", "model.num_attention_heads=12"],
    "gpt2-xl-width": ["model.num_layers=4", "model.hidden_size=1600", "model.num_attention_heads=25"],
}
COMMON = ["model.seq_length=256", "model.vocab_size=2048", "model.bias=false", "train.trackers=[]"]


def benchmark_config(model: str, *overrides: str) -> RunConfig:
    return load_config([], [*COMMON, *MODELS[model], *overrides])
