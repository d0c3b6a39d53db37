"""Validation inside the training loop: the mean loss over a fixed, evenly spaced choice of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import Mesh


def validation_loss(
    engine: TrainingEngine, dataset: Sequence[np.ndarray], num_samples: int, batch_size: int, mesh: Mesh
) -> float:
    """Mean loss per token, the same on all ranks. dataset[i]: int64 [T + 1]; every rank takes every n-th sample."""
    chosen = np.linspace(0, len(dataset) - 1, num=min(num_samples, len(dataset))).round().astype(int)
    own = chosen[mesh.data_parallel.rank :: mesh.data_parallel.size]
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for start in range(0, len(own), batch_size):
        rows = np.stack([dataset[int(index)] for index in own[start : start + batch_size]])
        tokens = torch.from_numpy(rows).to(mesh.device)
        loss = engine.evaluate(tokens[:, :-1], tokens[:, 1:])
        sums += torch.stack([loss.double() * len(rows), torch.tensor(len(rows), device=mesh.device)])
    total, count = mesh.data_parallel.sum_(sums).tolist()
    return total / count
