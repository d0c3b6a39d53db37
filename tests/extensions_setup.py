"""A tiny run for the tests that add something from outside of the package."""

from __future__ import annotations

from pathlib import Path

from megasparse.data import IndexedDatasetWriter

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=16",
    "model.vocab_size=64",
    "optimizer.lr=5e-3",
    "train.steps=12",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.log_interval=3",
    "train.trackers=[]",
    "sparsity.block_size=8",
    "sparsity.algorithm=rigl",
    "sparsity.update_interval=2",
    "kernels.tune=never",
]


def write_corpus(folder: Path) -> list[str]:
    """Documents that each go on by 3; returns the settings that name them, and `folder` for the runs."""
    with IndexedDatasetWriter(folder / "corpus", "uint16") as writer:
        for first in range(40):
            writer.add_document([(first + 3 * i) % 63 + 1 for i in range(60)] + [0])
        writer.finalize()
    return [f"data.train=[{{path: {folder / 'corpus'}}}]", f"run.folder={folder}"]
