"""How long a checkpoint holds up the training, and how long it takes until it is on disk.

    python benchmarks/checkpoint_saving.py --layers 12 --vocabulary 50304

A model of GPT-2-small width on random tokens, one process, float32. `blocked`: until training may go on, the first time
(host memory is taken then) and the median of the others, which wait for nothing; `written`: until the checkpoint is
committed; `restored`: until all of it has been read, compared with its checksums and put into an engine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_setup import benchmark_config, open_trainer
from result_file import write_result

from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.parallel import Mesh
from megasparse.training.checkpoints import Checkpointer


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
        started = time.perf_counter()
        trainer.train_step(loader)
        step = time.perf_counter() - started
        checkpointer = Checkpointer(folder, config, mesh, trainer.engine, trainer.methods)
        blocked, written = [], []
        for number in range(arguments.repeats):
            trainer.state.step = number + 1
            started = time.perf_counter()
            checkpointer.save(trainer.state)
            blocked.append(time.perf_counter() - started)
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
            "step_seconds": step,
            "blocked_first_seconds": blocked[0],
            "blocked_seconds": statistics.median(blocked[1:]),
            "written_seconds": statistics.median(written),
            "restored_seconds": restored,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    environment = LaunchEnvironment.from_variables(os.environ)
    with open_mesh(environment, 600, 1) as mesh, tempfile.TemporaryDirectory() as folder:
        found = measure(mesh, arguments, Path(folder))
    for name, value in found.items():
        print(f"{name}: {value:,.3f}" if isinstance(value, float) else f"{name}: {value:,}")
    print(write_result("checkpoint_saving", found, suffix=f"{arguments.layers}-layers").name)


if __name__ == "__main__":
    main()
