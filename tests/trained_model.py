"""A tiny model that has learned something, as a model folder: its layers' inputs go together as a real model's do."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megasparse.checkpoint.model_folder import ModelFolderWriter
from megasparse.config.loader import check_config
from megasparse.config.schema import RunConfig
from megasparse.models.build import build_model

ROOT = Path(__file__).resolve().parents[1]
T = 48
VOCABULARY = 257
"""Of bytes and the end of a document."""


def model_config(**model) -> RunConfig:
    shape = {
        "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": T, "vocab_size": VOCABULARY,
        "normalization": "rmsnorm", "position_embedding": "rope", "activation": "swiglu", "bias": False,
    }  # fmt: skip
    return check_config(
        {
            "model": {**shape, **model},
            "data": {"tokenizer": "bytes"},
            "train": {"precision": "fp32", "steps": 100, "global_batch_size": 4},
            "sparsity": {"algorithm": "dense"},
        }
    )


def text() -> str:
    """The documents of the repository: about 100 kB that are always here."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*/README.md")))


def trained(config: RunConfig, steps: int = 150) -> dict[str, torch.Tensor]:
    """Weights by name after some steps on ``text``, in some 10 seconds."""
    torch.manual_seed(0)
    model = build_model(config, VOCABULARY)
    stream = torch.tensor(list(text().encode()), dtype=torch.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(stream) - T - 1, (16,))
        batch = torch.stack([stream[start : start + T + 1] for start in starts.tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1)[:, :VOCABULARY], batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Untrained it is 5.5. The text changes with the documents of the repository, and the last batch with it.
    assert loss.item() < 3.5, loss
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def write_folder(folder: Path, config: RunConfig, weights: dict[str, torch.Tensor], topology=None) -> Path:
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    with ModelFolderWriter(folder, config, dtypes, facts={"step": 100}) as writer:
        for name in writer.names:
            # The table of the model is padded.
            rows = writer.specs[name].shape[0]
            writer.write(name, weights[name][:rows])
        if topology:
            writer.topology(topology)
    return folder
