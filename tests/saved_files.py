"""Checkpoint folders as DeepSpeed's stage 0 writes them, without a run: two parameters, one of them under two names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megasparse.checkpoint.layout import Layout, write_layout
from megasparse.checkpoint.store import TOPOLOGY, CheckpointStore, Manifest
from megasparse.parallel.shard_spec import ShardSpec

MODEL_STATES = "mp_rank_00_model_states.pt"
MODEL = {"hidden_size": 4}


def parameters(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"table.weight": torch.randn(6, 4, generator=generator), "norm.weight": torch.randn(4, generator=generator)}


def content(weights: dict[str, Tensor], steps: int = 3) -> dict[str, Any]:
    """Of the model states file; moments are the weights times 2 and 3, per-weight steps are kept of the first one."""
    state = {
        number: {"step": torch.tensor(float(steps)), "exp_avg": 2 * weight, "exp_avg_sq": 3 * weight}
        for number, weight in enumerate(weights.values())
    }
    if steps:
        state[0]["weight_steps"] = torch.full_like(weights["table.weight"], 7, dtype=torch.int16)
    return {
        "module": {**weights, "head.weight": weights["table.weight"]},
        "optimizer": {"state": state if steps else {}},
        "train_state": {"step": steps},
        "window_losses": [0.1, 0.3],
    }


def layout(**changes: Any) -> Layout:
    partitions = {"table.weight": ShardSpec((6, 4), 0), "norm.weight": ShardSpec((4,))}
    aliases, groups = {"head.weight": "table.weight"}, [["table.weight"], ["norm.weight"]]
    values = {"zero_stage": 0, "data_parallel_size": 2, "tensor_parallel_size": 1, "parameters": partitions}
    return Layout(**{**values, "aliases": aliases, "groups": groups, **changes})


def write(run_folder: Path, step: int, files: dict[str, Any], saved_layout: Layout | None = None) -> Path:
    """A checkpoint of step `step` with the given content by file name."""
    store = CheckpointStore(run_folder / "checkpoints", keep=9)
    partial = store.folder / store.begin(step)
    for name, value in files.items():
        torch.save(value, partial / name)
    save_file({"active/table": torch.tensor([step % 256], dtype=torch.uint8)}, partial / TOPOLOGY)
    write_layout(saved_layout or layout(), partial)
    return store.commit(Manifest(step=step, world_size=2, zero_stage=0, model=MODEL))


def write_good(run_folder: Path, step: int = 3, seed: int = 0) -> Path:
    return write(run_folder, step, {MODEL_STATES: content(parameters(seed), step)})
