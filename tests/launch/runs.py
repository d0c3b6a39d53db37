"""Small runs through the real entry script, as a user starts them: bytes of generated text, a tiny model, two ranks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import forked
import psutil
from ports import port_of, reserve_port
from processes import LIMIT_SECONDS, Process

from megasparse.data import IndexedDatasetWriter
from megasparse.data.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMPI_", "PMI_", "PMIX_", "MPI_", "SLURM_")
"""Beginnings of variables that launchers set: a run must not take those of the test for its own."""

FREE_PORT = "<free port>"
"""A word of a command line, in whose place ``start`` puts a port that nobody else gets."""

TINY = [
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.seq_length=32",
    "data.tokenizer=bytes",
    "data.valid_fraction=0.1",
    "optimizer.lr=5e-3",
    "train.steps=24",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "train.precision=fp32",
    "train.log_interval=1",
    "train.valid_interval=8",
    "train.valid_samples=8",
    "train.sample_tokens=10",
    "train.trackers=[]",
    "sparsity.block_size=16",
    "sparsity.density=0.2",
    "sparsity.update_interval=2",
    "sparsity.warmup_end=0.25",
    "attention.stride=8",
    # A start on a new machine would measure for seconds.
    "kernels.tune=never",
]

LONG = "train.steps=10000"
"""Does not end before a test ends it, after minutes. A start plans every step, which takes a second for so many."""


def write_corpus(folder: Path, num_documents: int = 40) -> Path:
    """An indexed data set of arithmetic-like lines; returns its prefix."""
    words = random.Random(0)
    tokenizer = load_tokenizer("bytes")
    prefix = folder / "corpus"
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for _ in range(num_documents):
            lines = (f"{a} + {b} = {a + b}\n" for a, b in (words.choices(range(100), k=2) for _ in range(40)))
            writer.add_document([*tokenizer.encode("".join(lines)), tokenizer.end_of_document_id])
        writer.finalize()
    return prefix


def command(corpus: Path, folder: Path, *overrides: str, ranks: int = 2, launcher: str = "ranks") -> list[str]:
    """The command line of a run of the entry script on so many ranks, started by `deepspeed` or by ``ranks.py``."""
    settings = [*TINY, f"data.train=[{{path: {corpus}}}]", f"run.folder={folder}", *overrides]
    entry = str(REPOSITORY / "launch" / "pretrain.py")
    if ranks == 1:
        return [sys.executable, entry, *settings]
    if launcher == "ranks":
        return [sys.executable, str(Path(__file__).with_name("ranks.py")), str(ranks), FREE_PORT, entry, *settings]
    assert launcher == "deepspeed", launcher
    program = str(Path(sys.executable).with_name("deepspeed"))
    return [program, "--num_accelerators", str(ranks), "--master_port", FREE_PORT, entry, *settings]


def run(
    arguments: list[str], *, expect: int = 0, variables: Mapping[str, str] | None = None, fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run to the end; fails with the output where the exit status is another, or at the time limit."""
    return finish(start(arguments, variables, fresh=fresh), expect=expect)


def finish(process: Process, *, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Wait for the end of what ``start`` started, in the same way."""
    with process:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == expect, f"exit status {process.returncode}, expected {expect}:\n{output}"
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def start(arguments: list[str], variables: Mapping[str, str] | None = None, *, fresh: bool = False) -> Process:
    """Start with output and errors in one pipe; variables: added to the environment; fresh: never forked."""
    common = {
        **{key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)},
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "200",
    }
    environment = {**common, **(variables or {})}
    with reserve_port() as reserved:
        words = [str(port_of(reserved)) if word == FREE_PORT else word for word in arguments]
        kind = forked.Process if not fresh and forked.can_fork(words, environment, common) else Process
        return kind(
            words,
            environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            # The launcher holds the port as long as it lives.
            pass_fds=[reserved.fileno()],
        )


def rank_process(launcher: Process, rank: int) -> int:
    """Process id of a rank below the launcher."""
    for child in psutil.Process(launcher.pid).children(recursive=True):
        words = child.cmdline()
        if f"--local_rank={rank}" in words and any(word.endswith("pretrain.py") for word in words):
            return child.pid
    raise AssertionError(f"rank {rank} is not running")


def wait_for_steps(process: Process, folder: Path, steps: int) -> None:
    """Wait until so many lines of metrics are written."""
    path = folder / "metrics.jsonl"
    _wait(process, lambda: path.is_file() and len(path.read_text().splitlines()) >= steps)


def wait_for_checkpoint(process: Process, folder: Path) -> None:
    """Wait until there is a whole one: they are written beside the steps that follow."""
    _wait(process, lambda: any((folder / "checkpoints").glob("step-*/index.json")))


def _wait(process: Process, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if condition():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("the run did not come so far in time")


def metrics(run_folder: Path) -> list[dict]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def curve(run_folder: Path) -> list[tuple]:
    """Everything that must not change over a restart."""
    keys = ("step", "tokens", "loss", "val_loss", "density", "phase", "lr", "grad_norm", "flops_algorithmic")
    return [tuple(line.get(key) for key in keys) for line in metrics(run_folder)]


def golden_path(algorithm: str) -> Path:
    return REPOSITORY / "tests" / "golden" / f"{algorithm}.txt"


def golden_text(run_folder: Path) -> str:
    """The curve of a run as it is kept: step, loss, validation loss, density, phase."""
    rows = []
    for line in metrics(run_folder):
        losses = f"{line['loss']:.6f} {line.get('val_loss', float('nan')):.6f}"
        rows.append(f"{line['step']} {losses} {line['density']:.6f} {line['phase']}")
    return "step loss val_loss density phase\n" + "\n".join(rows) + "\n"
