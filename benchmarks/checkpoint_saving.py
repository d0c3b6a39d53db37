"""How long a checkpoint holds up the training, and how long it takes until it is on disk.

    python benchmarks/checkpoint_saving.py --layers 12 --vocabulary 50304

A model of GPT-2-small width on random tokens, one process, float32. `blocked`: what the training waits for, that is,
beginning the save and, before the next optimizer step, the rest of the copy to the host (the first time its memory is
taken); `slower`: by how much a step with a save takes longer than one without, of medians, which also counts the cores
and the memory traffic that the copy takes from the forward and backward passes; `written`: until the checkpoint is
committed; `restored`: until all of it has been read, compared with its checksums and put into an engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_setup import benchmark_config, open_trainer
from result_file import write_result

from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.methods.callback import Callback, Step
from megasparse.parallel import Mesh
from megasparse.training.checkpoints import Checkpointer


class Waiting(Callback):
    """Lets weights change when they have been copied. seconds: for which the last step has waited."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer, self.seconds = checkpointer, 0.0

    def after_backward(self, step: Step) -> None:
        self.seconds = seconds_of(self._checkpointer.wait_for_copy)


def seconds_of(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(mesh: Mesh, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    config = benchmark_config(
        "gpt2-small-width",
        f"model.num_layers={arguments.layers}",
        f"model.vocab_size={arguments.vocabulary}",
        "train.precision=fp32",
        "train.micro_batch_size=1",
        "train.global_batch_size=1",
        "deepspeed.zero_stage=0",
    )
    with open_trainer(config, mesh) as (trainer, loader):
        checkpointer = Checkpointer(folder, config, mesh, trainer.engine, trainer.methods)
        trainer.callbacks = [waiting := Waiting(checkpointer)]
        trainer.train_step(loader)
        plain, saving, blocked, written = [], [], [], []
        for _ in range(arguments.repeats):
            plain.append(seconds_of(lambda: trainer.train_step(loader)))
            started = time.perf_counter()
            begun = seconds_of(lambda: checkpointer.save(trainer.state))
            trainer.train_step(loader)
            saving.append(time.perf_counter() - started)
            blocked.append(begun + waiting.seconds)
            checkpointer.finish()
            written.append(time.perf_counter() - started)
        (newest, *_) = checkpointer.store.folders()
        size = sum(path.stat().st_size for path in newest.iterdir())
        started = time.perf_counter()
        assert checkpointer.restore().state is not None
        restored = time.perf_counter() - started
        return {
            "parameters": trainer.engine.model.num_parameters(),
            "bytes": size,
            "step_seconds": statistics.median(plain),
            "blocked_first_seconds": blocked[0],
            "blocked_seconds": statistics.median(blocked[1:]),
            "slower_seconds": statistics.median(saving[1:]) - statistics.median(plain),
            "written_seconds": statistics.median(written),
            "restored_seconds": restored,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    environment = LaunchEnvironment.from_variables(os.environ)
    with open_mesh(environment, 600, 1) as mesh, tempfile.TemporaryDirectory() as folder:
        found = measure(mesh, arguments, Path(folder))
    for name, value in found.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value:,}")
    print(write_result("checkpoint_saving", found, suffix=f"{arguments.layers}-layers").name)


if __name__ == "__main__":
    main()
