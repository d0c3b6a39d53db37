"""Validation inside the training loop: the mean loss over a fixed, evenly spaced choice of samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megasparse.data import split_samples
from megasparse.engine.training_engine import TrainingEngine
from megasparse.parallel import Mesh


def validation_loss(
    engine: TrainingEngine, dataset: Sequence[np.ndarray], num_samples: int, batch_size: int, mesh: Mesh
) -> float:
    """Mean loss per token, the same on all ranks. dataset[i]: a sample; every rank takes every n-th of them."""
    chosen = np.linspace(0, len(dataset) - 1, num=min(num_samples, len(dataset))).round().astype(int)
    ranks = mesh.data_parallel
    own = chosen[ranks.rank :: ranks.size]
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    # As many forward passes on every rank: a divided model gathers its weights in each of them.
    for start in range(0, -(-len(chosen) // ranks.size), batch_size):
        batch = own[start : start + batch_size]
        rows = np.stack([dataset[int(index)] for index in (batch if len(batch) else chosen[:1])])
        loss = engine.evaluate(*split_samples(torch.from_numpy(rows).to(mesh.device)))
        if len(batch):
            sums += torch.stack([loss.double() * len(batch), torch.tensor(len(batch), device=mesh.device)])
    total, count = ranks.sum_(sums).tolist()
    return total / count
