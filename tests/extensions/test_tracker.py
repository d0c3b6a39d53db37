"""A tracker from outside the package: a class and an entry of the registry, here a table of comma-separated values."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path

from harness import run_distributed

from megasparse.config.loader import load_config
from megasparse.data import IndexedDatasetWriter
from megasparse.launching import LaunchEnvironment
from megasparse.monitoring.tracked_run import TrackedRun
from megasparse.monitoring.trackers import TRACKERS, TrackerKind
from megasparse.training.run import pretrain

SETTINGS = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.seq_length=16",
    "model.vocab_size=64",
    "train.steps=8",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.log_interval=2",
    "train.trackers=[table]",
    "sparsity.block_size=8",
    "sparsity.algorithm=rigl",
    "sparsity.update_interval=2",
    "kernels.tune=never",
]


class TableTracker:
    """`table.csv` in the run folder: a column per number of the first line, and above it the seed of the run."""

    def __init__(self, run: TrackedRun) -> None:
        # Exclusively: a second rank that opened it would fail.
        self.file = (run.folder / "table.csv").open("x", newline="")
        self.file.write(f"# {run.project}/{run.name}, seed {run.parameters['run']['seed']}\n")
        self.rows: csv.DictWriter | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.rows is None:
            self.rows = csv.DictWriter(self.file, ["step", *values], extrasaction="ignore")
            self.rows.writeheader()
        self.rows.writerow({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self.file.write(f"# {'failed' if failed else 'finished'}\n")
        self.file.close()


def train(words: list[str]) -> None:
    TRACKERS["table"] = TrackerKind(TableTracker, packages=("csv",))
    pretrain(load_config([], words), LaunchEnvironment.from_variables(os.environ))


def test_a_new_tracker_is_given_the_numbers_of_the_first_rank(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "corpus", "uint16") as writer:
        for first in range(40):
            writer.add_document([(first + 3 * i) % 63 + 1 for i in range(60)] + [0])
        writer.finalize()
    names = [
        f"data.train=[{{path: {tmp_path / 'corpus'}}}]",
        f"run.folder={tmp_path / 'runs'}",
        "run.name=mine",
        "run.seed=7",
    ]
    run_distributed(train, 2, [*SETTINGS, *names], with_mesh=False)
    folder = tmp_path / "runs" / "mine"
    first, *table, last = (folder / "table.csv").read_text().splitlines()
    assert (first, last) == ("# runs/mine, seed 7", "# finished")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(table))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8]
    assert [float(row["loss"]) for row in rows] == [line["loss"] for line in lines]
