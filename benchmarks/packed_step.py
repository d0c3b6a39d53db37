"""A training step with packed storage against one with dense storage at the same density: seconds, optimizer, bytes.

    python benchmarks/packed_step.py [--densities 0.1 0.25] [--stages 1 2 3] [--precision bf16] [--sparse-head]
    torchrun --standalone --nproc-per-node 2 benchmarks/packed_step.py

Two trainers stand side by side in one process, at constant density without topology updates, and take turns: each round
times some steps of one, then of the other, and one more step of each by part. Bytes of weights, gradients and optimizer
state are counted on this rank's tensors, those of a checkpoint on the disk; bytes sent in a step are those of the plan,
which tests/distributed/test_resources.py compares with what runs send.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch
from bench_setup import MODELS, SIZES, benchmark_config, open_trainer, seconds_per_step
from part_timer import PartTimer
from result_file import RESULTS, write_result

from megasparse.config.schema import Pattern, RunConfig
from megasparse.cost.resources import communication_per_rank
from megasparse.data import BatchLoader
from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.training.build_engine import capacities_of
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.loop import Trainer

STORAGES = ("dense", "packed")


def main() -> None:
    arguments = parse_arguments()
    os.environ["DS_ACCELERATOR"] = arguments.device
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh:
        rows = [
            measure(arguments, mesh, stage, density) for stage in arguments.stages for density in arguments.densities
        ]
        if mesh.is_first:
            head = "-head" if arguments.sparse_head else ""
            suffix = f"{arguments.model}-{arguments.precision}{head}-ranks{mesh.world_size}"
            numbers = {"ranks": mesh.world_size, "threads": torch.get_num_threads(), "results": rows}
            print(write_result("packed_step", numbers, suffix=suffix, folder=arguments.results).name)


def measure(arguments: argparse.Namespace, mesh: Mesh, stage: int, density: float) -> dict[str, Any]:
    """Both storages at one ZeRO stage and density."""
    configs = {storage: make_config(arguments, storage, stage, density, mesh.world_size) for storage in STORAGES}
    with ExitStack() as stack:
        runs = {storage: stack.enter_context(open_trainer(config, mesh)) for storage, config in configs.items()}
        steps: dict[str, list[float]] = {storage: [] for storage in STORAGES}
        optimizer: dict[str, list[float]] = {storage: [] for storage in STORAGES}
        for _ in range(arguments.rounds + 1):
            for storage, run in runs.items():
                steps[storage].append(seconds_per_step(*run, arguments.steps))
            for storage, run in runs.items():
                optimizer[storage].append(optimizer_seconds(*run))
        # The first round warms up caches and allocators.
        row: dict[str, Any] = {"zero_stage": stage, "density": density}
        for storage, (trainer, _) in runs.items():
            row[storage] = {
                "step_seconds": statistics.median(steps[storage][1:]),
                "optimizer_seconds": statistics.median(optimizer[storage][1:]),
                "rounds": steps[storage][1:],
                **held_bytes(trainer),
                "checkpoint_bytes": checkpoint_bytes(trainer, configs[storage], mesh),
                "sent_bytes": sent_bytes(trainer, configs[storage], mesh),
            }
        for trainer, _ in runs.values():
            trainer.engine.close()
    del runs, trainer
    gc.collect()
    if mesh.is_first:
        show(row)
    return row


def make_config(arguments: argparse.Namespace, storage: str, stage: int, density: float, world_size: int) -> RunConfig:
    length, vocabulary = SIZES[arguments.model]
    samples = max(arguments.tokens // length, 1)
    return benchmark_config(
        arguments.model,
        "sparsity.algorithm=rigl",
        f"sparsity.storage={storage}",
        f"sparsity.density={density}",
        f"sparsity.block_size={arguments.block}",
        f"sparsity.head={str(arguments.sparse_head).lower()}",
        "sparsity.update_interval=1000000",
        f"attention.windows=[{{start: 0.0, end: 1.0, pattern: {arguments.attention_pattern}}}]",
        f"model.num_layers={arguments.layers}",
        f"model.seq_length={length}",
        f"model.vocab_size={vocabulary}",
        f"train.precision={arguments.precision}",
        f"train.micro_batch_size={samples}",
        f"train.global_batch_size={samples * world_size}",
        "train.steps=2000000",
        f"deepspeed.zero_stage={stage}",
    )


def optimizer_seconds(trainer: Trainer, loader: BatchLoader) -> float:
    """Of one step."""
    timer = PartTimer(trainer)
    with timer.attached():
        trainer.train_step(loader)
    return timer.seconds()["optimizer"]


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Of this rank: weights and gradients of the sparse matrices as the model has them, and their optimizer state."""
    engine = trainer.engine
    weights = {name: layer.weight for name, layer in engine.model.sparse_layers().items()}
    fragments = engine.access(weights).fragments().values()
    return {
        "sparse_weight_bytes": sum(
            getattr(weight, "ds_numel", weight.numel()) * weight.element_size() for weight in weights.values()
        ),
        "sparse_state_bytes": sum(
            tensor.numel() * tensor.element_size()
            for fragment in fragments
            for tensor in (fragment.master, *fragment.moments.values())
        ),
        "sparse_gradient_bytes": sum(f.gradient.numel() * f.gradient.element_size() for f in fragments),
    }


def checkpoint_bytes(trainer: Trainer, config: RunConfig, mesh: Mesh) -> int:
    """Of all files of a checkpoint, which all ranks write into a folder that the first one names and removes."""
    number = int(mesh.from_first(torch.tensor(os.getpid())))
    folder = Path(tempfile.gettempdir()) / f"packed-step-{number}"
    with Checkpointer(folder, config, mesh, trainer.engine, trainer.methods) as checkpointer:
        checkpointer.save(trainer.state)
        checkpointer.finish()
    mesh.barrier()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    mesh.barrier()
    if mesh.is_first:
        shutil.rmtree(folder)
    return size


def sent_bytes(trainer: Trainer, config: RunConfig, mesh: Mesh) -> float:
    """Data-parallel, in an ordinary step; of a model that is not in pieces, as at stage 3 that of the engine is."""
    (method,), capacities = trainer.methods, capacities_of(trainer.engine)
    with torch.device("meta"):
        model = build_model(config, config.model.vocab_size, CommunicationGroup(), capacities=capacities)
    return communication_per_rank(config, model, method.controller, mesh.world_size)["data_parallel"]


def show(row: dict[str, Any]) -> None:
    dense, packed = (row[storage] for storage in STORAGES)
    print(f"stage {row['zero_stage']}, density {row['density']}")
    for name in (key for key in dense if key != "rounds"):
        ratio = f"{packed[name] / dense[name]:.3f}" if dense[name] else "-"
        print(f"  {name:22s} dense {dense[name]:14.6g}  packed {packed[name]:14.6g}  {ratio}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small-width")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1], help="(default: 0.1)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1], help="ZeRO stages (default: 1)")
    parser.add_argument("--block", type=int, default=64, help="side of the blocks (default: 64)")
    parser.add_argument("--sparse-head", action="store_true", help="the head is sparse too, as in the paper")
    parser.add_argument("--attention-pattern", choices=get_args(Pattern), default="sparse", help="(default: sparse)")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step and rank (default: 2048)")
    parser.add_argument("--steps", type=int, default=2, help="steps per round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each trainer (default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
