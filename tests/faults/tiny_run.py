"""The run that faults are injected into: 12 steps of a tiny model, five topology updates, a checkpoint every 2 steps.

    laboratory = Laboratory(folder)
    golden = laboratory.golden(layout)          # run folder of an undisturbed run, made on first use
    stopped = laboratory.stopped(layout, 6)     # the same, stopped after step 6

A working folder holds the run as `runs/run` and its data as `data/corpus`, named relative to it: it can be copied.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from forked_ranks import Ranks, start_ranks
from runs import write_corpus

STEPS, SAVE_INTERVAL = 12, 2
LIMIT_SECONDS = 150.0
"""Of one start. It takes 2 seconds alone; a hang is noticed by the run's own watchdog after 20."""

SETTINGS = [
    "run.folder=runs",
    "run.name=run",
    "data.train=[{path: data/corpus}]",
    "data.tokenizer=bytes",
    "data.valid_fraction=0.1",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "optimizer.lr=5e-3",
    f"train.steps={STEPS}",
    f"train.save_interval={SAVE_INTERVAL}",
    "train.keep_checkpoints=2",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.precision=fp32",
    # Sums that span a checkpoint are part of what is restored.
    "train.log_interval=3",
    "train.valid_interval=4",
    "train.valid_samples=4",
    "train.sample_tokens=10",
    "train.trackers=[]",
    "train.step_timeout_seconds=20",
    "train.distributed_timeout_seconds=60",
    "train.start_timeout_seconds=60",
    "train.resume=auto",
    "sparsity.density=0.2",
    "sparsity.update_interval=2",
    "sparsity.warmup_end=0.25",
    "sparsity.restoration_start=0.5",
    "sparsity.restoration_end=0.8",
    "attention.stride=8",
    "kernels.tune=never",
]


@dataclass(frozen=True)
class Layout:
    """How a run lies on its ranks."""

    ranks: int
    zero_stage: int
    block_size: int
    tensor_parallel: int = 1

    @property
    def name(self) -> str:
        return f"ranks{self.ranks}-zero{self.zero_stage}-block{self.block_size}-tensor{self.tensor_parallel}"

    @property
    def has_replicas(self) -> bool:
        return self.ranks > self.tensor_parallel

    def settings(self) -> list[str]:
        return [
            f"deepspeed.zero_stage={self.zero_stage}",
            f"sparsity.block_size={self.block_size}",
            f"parallel.tensor_parallel_size={self.tensor_parallel}",
        ]


LAYOUTS = (
    Layout(2, 1, 16),
    Layout(2, 0, 1),
    Layout(2, 2, 1),
    Layout(2, 3, 16),
    Layout(2, 0, 16, tensor_parallel=2),
    Layout(2, 1, 1),
    Layout(2, 2, 16),
    Layout(1, 1, 16),
    Layout(2, 3, 1),
    Layout(2, 0, 16),
    Layout(2, 1, 1, tensor_parallel=2),
)
"""A try takes that of its number. Eleven, so that kinds with as many variants as 2, 3 or 4 meet all of them."""


class Laboratory:
    """Data and undisturbed runs, made once and copied for each try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start_seconds = 2.0
        """What an undisturbed run took the last time: more on a busy machine."""
        self._data = folder / "data"
        if not self._data.exists():
            self._data.mkdir(parents=True)
            write_corpus(self._data)

    def golden(self, layout: Layout) -> Path:
        return self.stopped(layout, STEPS) / "runs" / "run"

    def stopped(self, layout: Layout, step: int) -> Path:
        """Working folder of a run that was stopped after `step`."""
        folder = self.folder / f"{layout.name}-step{step}"
        if not folder.exists():
            making = self.folder / "making"
            shutil.rmtree(making, ignore_errors=True)
            self.new_folder(making)
            ended = start(layout, making, f"train.stop_after={step}").wait(LIMIT_SECONDS)
            self.start_seconds = ended.seconds
            assert not any(ended.statuses), f"the undisturbed run failed: {ended.text[-3000:]}"
            making.rename(folder)
        return folder

    def new_folder(self, folder: Path) -> Path:
        """A working folder without a run."""
        folder.mkdir(parents=True)
        shutil.copytree(self._data, folder / "data")
        return folder


def start(
    layout: Layout, folder: Path, *overrides: str, of_rank: dict[int, list[str]] | None = None, **options
) -> Ranks:
    """Start the run in a working folder. overrides: settings of all ranks; of_rank: of some."""
    words = [*SETTINGS, *layout.settings(), *overrides]
    commands = [[*words, *(of_rank or {}).get(rank, [])] for rank in range(layout.ranks)]
    return start_ranks(commands, folder, **options)
