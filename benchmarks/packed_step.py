"""A training step with packed storage against one with dense storage at the same density: seconds, optimizer, bytes.

    python benchmarks/packed_step.py [--precision bf16] [--sparse-head]
    python benchmarks/packed_step.py --ranks 1 2 4 --densities 0.05 0.1 0.25 0.5 --stages 1 2 3
    torchrun --standalone --nproc-per-node 2 benchmarks/packed_step.py

The result is rewritten after each stage and density. Started again on the same day with the same settings, the script
goes on with what is missing (`--anew`: measures all again). ZeRO stage 0 needs `--precision fp32`.

Two trainers stand side by side in one process, at constant density without topology updates, and take turns: each round
times some steps of one, then of the other, and one more step of each by part. Bytes of weights, gradients and optimizer
state are counted on this rank's tensors, those of a checkpoint on the disk; bytes sent in a step are those of the plan,
which tests/distributed/test_resources.py compares with what runs send. Last, the engine is built anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from bench_setup import MODELS, SIZES, benchmark_config, open_trainer, seconds_per_step
from part_timer import PartTimer
from result_file import RESULTS, result_path, write_result

from megasparse.config.schema import Pattern, RunConfig
from megasparse.cost.resources import communication_per_rank
from megasparse.data import BatchLoader
from megasparse.engine.training_engine import TrainingEngine
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.methods.callback import TrainingMethod
from megasparse.models.build import build_model
from megasparse.parallel import CommunicationGroup, Mesh
from megasparse.training.build_engine import Renewal, RunStorage, capacities_of
from megasparse.training.checkpoints import Checkpointer
from megasparse.training.loop import Trainer

STORAGES = ("dense", "packed")


def main() -> None:
    several, words = parse_ranks()
    for ranks in several:
        start_on(ranks, words)
    if several:
        return
    arguments = parse_arguments(words)
    os.environ["DS_ACCELERATOR"] = arguments.device
    if arguments.device == "cpu":
        keep_host_memory(os.environ)
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh:
        head = "-head" if arguments.sparse_head else ""
        suffix = f"{arguments.model}-{arguments.precision}{head}-ranks{mesh.world_size}"
        settings = {"ranks": mesh.world_size, "threads": torch.get_num_threads(), **shared_settings(arguments)}
        path = result_path("packed_step", suffix, arguments.results)
        rows = [] if arguments.anew else known_rows(path, settings)
        cases = list(product(arguments.stages, arguments.densities))
        known = [any((row["zero_stage"], row["density"]) == case for row in rows) for case in cases]
        # Only the first rank may see the file.
        for case, is_known in zip(cases, mesh.from_first(torch.tensor(known)).tolist(), strict=True):
            if not is_known:
                rows.append(measure(arguments, mesh, *case))
            if mesh.is_first and not is_known:
                numbers = {**settings, "results": rows}
                print(write_result("packed_step", numbers, suffix=suffix, folder=arguments.results).name, flush=True)


def start_on(ranks: int, words: Sequence[str]) -> None:
    """This script on so many ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run([*launcher, __file__, *words], check=True)


def shared_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a file have in common."""
    names = ("model", "precision", "device", "block", "sparse_head", "attention_pattern", "layers", "tokens")
    return {name: getattr(arguments, name) for name in (*names, "steps", "rounds")}


def known_rows(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an earlier start with the same settings. Raises ValueError where they were others: rows would be lost."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if found.get(name) != value:
            raise ValueError(
                f"{path} has {name} {found.get(name)}, and {value} is asked for; must be the same, or give another "
                "folder with --results, or --anew to write over it"
            )
    return found["results"]


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
        row["rebuild_seconds"] = rebuild_seconds(runs["packed"][0], configs["packed"], mesh)
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


class AtOnce(Renewal):
    """Builds the engine anew with the capacities that it has."""

    def due(self, engine: TrainingEngine, methods: Sequence[TrainingMethod], step: int) -> Mapping[str, int]:
        return capacities_of(engine)


def rebuild_seconds(trainer: Trainer, config: RunConfig, mesh: Mesh) -> float:
    """To build the engine anew between two steps, as where the capacity changes: the median of three."""
    storage = RunStorage.of(config, config.model.vocab_size, mesh.tensor_parallel)
    assert storage is not None
    trainer.renewal, seconds = AtOnce(config, config.model.vocab_size, mesh, storage), []
    for _ in range(3):
        mesh.barrier()
        start = time.perf_counter()
        trainer.renew_engine()
        mesh.barrier()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


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
    print(f"  engine built anew in {row['rebuild_seconds']:.2f} s")
    for name in (key for key in dense if key != "rounds"):
        ratio = f"{packed[name] / dense[name]:.3f}" if dense[name] else "-"
        print(f"  {name:22s} dense {dense[name]:14.6g}  packed {packed[name]:14.6g}  {ratio}", flush=True)


def parse_ranks() -> tuple[list[int], list[str]]:
    """Numbers of ranks to be started one after the other, and the other words."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", default=[])
    arguments, words = parser.parse_known_args()
    return arguments.ranks, words


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
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
    parser.add_argument("--ranks", type=int, nargs="+", help="start it on so many ranks, one number after the other")
    parser.add_argument("--anew", action="store_true", help="measure again what the result file of today has")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
