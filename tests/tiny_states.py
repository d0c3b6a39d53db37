"""A tiny model with moments as a saved state in memory, as a run folder and as a model folder."""

from __future__ import annotations

from pathlib import Path

import torch

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.checkpoint.saved_state import RunFacts
from megasparse.checkpoint.writing import write_checkpoint
from megasparse.config.loader import check_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.models.build import build_model
from megasparse.training.state import TrainState

STEP = 6


def dense_config(**sparsity) -> RunConfig:
    """vocab_size 96 is a multiple of what tables are padded to."""
    model = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 96,
        "vocab_size_multiple": 32,
    }  # fmt: skip
    train = {"steps": 24, "precision": "fp32", "global_batch_size": 4}
    return check_config(
        {"model": model, "train": train, "sparsity": {"algorithm": "dense", "block_size": 8, **sparsity}}
    )


class TinyState:
    """A dense model with random weights and moments after some steps: a ``SavedState``."""

    def __init__(self, config: RunConfig, step: int = STEP, vocab_size: int = 96) -> None:
        model = build_model(config, vocab_size)
        generator = torch.Generator().manual_seed(7)
        self.tensors = {}
        for name, parameter in model.named_parameters():
            weight = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
            moment = torch.randn(parameter.shape, generator=generator)
            self.tensors[name] = {"fp32": weight, "exp_avg": moment, "exp_avg_sq": moment.square()}
        self.shapes = {name: tuple(kinds["fp32"].shape) for name, kinds in self.tensors.items()}
        self.step = step
        state = TrainState(step=step, consumed_samples=step * config.train.global_batch_size, tokens=99)
        self.facts = RunFacts(step, config.model.model_dump(mode="json"), state.to_dict(), [0.0])

    def kinds(self, name: str) -> list[str]:
        return list(self.tensors[name])

    def tensor(self, name: str, kind: str) -> torch.Tensor:
        return self.tensors[name][kind]

    def topology(self) -> dict[str, torch.Tensor]:
        return {}

    def loss_scaler(self) -> dict[str, float]:
        return {}


def write_run(folder: Path, saved, config: RunConfig) -> Path:
    """A run folder with one checkpoint."""
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    write_checkpoint(saved, folder)
    return folder


def write_model(folder: Path, saved, config: RunConfig) -> Path:
    with ModelFolderWriter(folder, config, dict.fromkeys(saved.shapes, torch.float32)) as writer:
        for name in writer.names:
            writer.write(name, saved.tensor(name, "fp32"))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
