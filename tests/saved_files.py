"""Checkpoint folders without a run: two parameters, one of them under two names."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megasparse.checkpoint.saved_state import RunFacts
from megasparse.checkpoint.writing import write_checkpoint

FILE = "rank-00000.safetensors"
MODEL = {"hidden_size": 4, "tie_embeddings": True}
TABLE, NORM = "embedding.tokens.weight", "norm.weight"


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {TABLE: torch.randn(6, 4, generator=generator), NORM: torch.randn(4, generator=generator)}


class SmallState:
    """A ``SavedState``; moments are the weights times 2 and 3, per-weight steps are kept of the table."""

    def __init__(self, step: int, seed: int = 0) -> None:
        self.step, self.weights = step, parameters(seed)
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        self.facts = RunFacts(step, MODEL, {"step": step}, [0.1, 0.3])

    def kinds(self, name: str) -> list[str]:
        moments = ["exp_avg", "exp_avg_sq", *(["weight_steps"] if name == TABLE else [])]
        return ["fp32", *(moments if self.step else [])]

    def tensor(self, name: str, kind: str) -> Tensor:
        if kind == "weight_steps":
            return torch.full_like(self.weights[name], 7, dtype=torch.int16)
        return {"fp32": 1, "exp_avg": 2, "exp_avg_sq": 3}[kind] * self.weights[name]

    def topology(self) -> dict[str, Tensor]:
        return {"active/head": torch.tensor([self.step % 256], dtype=torch.uint8)}

    def loss_scaler(self) -> dict[str, float]:
        return {"cur_scale": 8.0}


def write_good(run_folder: Path, step: int = 3, seed: int = 0, keep: int = 9) -> Path:
    """A checkpoint of step `step`."""
    return write_checkpoint(SmallState(step, seed), run_folder, keep=keep)
