"""A training step of the ultra-sparse phase against the dense one, whole and by part, with the Amdahl ceiling.

    python benchmarks/train_step.py [--model gpt2-small-width] [--precision fp32] [--density 0.1] [--block 64]
        [--kernel auto] [--sparse-head] [--storage packed] [--attention-pattern sparse] [--layers 4] [--tokens 2048]
        [--device cpu]

Trainers stand side by side in one process, dense and sparse at constant density without topology updates (those are
`topology_step.py`'s), and take turns: each round times some steps of one, then of the other, and takes one more step of
each apart by hooks, see `part_timer.py`. Medians over the rounds; the parts are scaled so that they add up to the step
without hooks.

What computes dense products (`kernels.dense`) is measured first, as a run does where it starts for the first time.
Where that chooses others than torch's, a third trainer is dense with torch's own: the speed-up is stated over both.

The ceilings say what the rest of the step allows, with the sparse layers' products (those of a sparse head included)
free of cost, or at exactly density times their dense cost.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import torch
from bench_setup import MODELS, SIZES, benchmark_config, open_trainer, seconds_per_step
from part_timer import PartTimer
from result_file import RESULTS, write_result

from megasparse.config.execution import KernelsConfig
from megasparse.config.schema import Pattern, RunConfig
from megasparse.data import BatchLoader
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.launching.host_memory import use_huge_pages
from megasparse.training.loop import Trainer
from megasparse.training.plan import make_plan
from megasparse.tuning.first_start import fit_tables

KINDS = ("dense", "sparse", "torch")
"""`torch`: dense, with torch's own products."""


def main() -> None:
    arguments = parse_arguments()
    os.environ["DS_ACCELERATOR"] = arguments.device
    if arguments.device == "cpu":
        (use_huge_pages if arguments.give_back_memory else keep_host_memory)(os.environ)
    configs = {kind: make_config(arguments, kind) for kind in KINDS}
    products = measured_products(configs["dense"])
    measured_products(configs["sparse"])
    if set(products.values()) == {"torch"}:
        del configs["torch"]
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh, ExitStack() as stack:
        runs = {kind: stack.enter_context(open_trainer(config, mesh)) for kind, config in configs.items()}
        steps: dict[str, list[float]] = {kind: [] for kind in runs}
        parts: dict[str, list[dict[str, float]]] = {kind: [] for kind in runs}
        for _ in range(arguments.rounds + 1):
            for kind, run in runs.items():
                steps[kind].append(seconds_per_step(*run, arguments.steps))
            for kind, run in runs.items():
                parts[kind].append(seconds_by_part(*run))
    # The first round warms up caches and allocators.
    found = ({kind: measured[kind][1:] for kind in configs} for measured in (steps, parts))
    report(arguments, configs["sparse"], products, *found)


def measured_products(config: RunConfig) -> dict[str, str]:
    """What computes the dense products of each kind of layer, after the measurement of a first start."""
    fit_tables(config, make_plan(config, 1), tell=print, warn=print)
    return {row["layer"]: row["kernel"] for row in make_plan(config, 1)["kernels"]["dense"]}


def make_config(arguments: argparse.Namespace, kind: str) -> RunConfig:
    length, vocabulary = SIZES[arguments.model]
    sequences = arguments.tokens // length
    if sequences < 1 or arguments.tokens % length:
        raise SystemExit(f"--tokens: {arguments.tokens} is no multiple of the sequence length {length}")
    sparse = [
        "sparsity.algorithm=rigl",
        f"sparsity.density={arguments.density}",
        f"sparsity.block_size={arguments.block}",
        f"sparsity.head={str(arguments.sparse_head).lower()}",
        f"sparsity.storage={arguments.storage}",
        "sparsity.update_interval=1000000",
        f"attention.windows=[{{start: 0.0, end: 1.0, pattern: {arguments.attention_pattern}}}]",
    ]
    return benchmark_config(
        arguments.model,
        *(sparse if kind == "sparse" else ["sparsity.algorithm=dense"]),
        f"kernels.dense={'torch' if kind == 'torch' else 'auto'}",
        f"kernels.block_sparse={arguments.kernel}",
        f"model.num_layers={arguments.layers}",
        f"model.seq_length={length}",
        f"model.vocab_size={vocabulary}",
        f"train.precision={arguments.precision}",
        f"train.micro_batch_size={sequences}",
        f"train.global_batch_size={sequences}",
        "train.steps=2000000",
        f"deepspeed.zero_stage={0 if arguments.precision == 'fp32' else 1}",
    )


def seconds_by_part(trainer: Trainer, loader: BatchLoader) -> dict[str, float]:
    """Of one step; `data` is the time that the loop waited for it."""
    timer, waited = PartTimer(trainer), trainer.state.ledger.by_part()["data"]
    with timer.attached():
        trainer.train_step(loader)
    found = timer.seconds()
    found["data"] = trainer.state.ledger.by_part()["data"] - waited
    found["other"] -= found["data"]
    return found


def median_parts(rounds: list[dict[str, float]], step: float) -> dict[str, float]:
    """Medians by part, largest first, scaled to add up to `step`."""
    medians = {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}
    scale = step / sum(medians.values())
    return {name: seconds * scale for name, seconds in sorted(medians.items(), key=lambda item: -item[1])}


def products(parts: dict[str, float], sparse_head: bool) -> float:
    """Seconds of the products of those layers that are sparse."""
    names = ("linear", "head") if sparse_head else ("linear",)
    return sum(parts.get(f"{phase}.{name}", 0.0) for phase in ("forward", "backward") for name in names)


def report(
    arguments: argparse.Namespace,
    config: RunConfig,
    products_of: dict[str, str],
    steps: dict[str, list[float]],
    rounds: dict[str, list[dict[str, float]]],
) -> None:
    medians = {kind: statistics.median(seconds) for kind, seconds in steps.items()}
    dense, sparse = medians["dense"], medians["sparse"]
    parts = {kind: median_parts(rounds[kind], seconds) for kind, seconds in medians.items()}
    dense_products, sparse_products = (products(parts[kind], arguments.sparse_head) for kind in ("dense", "sparse"))
    speedups = {kind: ratios(steps[kind], steps["sparse"]) for kind in steps if kind != "sparse"}
    rest = sparse - sparse_products
    numbers = {
        "model": arguments.model,
        "layers": arguments.layers,
        "precision": arguments.precision,
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "tokens_per_step": arguments.tokens,
        "sequence_length": config.model.seq_length,
        "vocabulary": config.model.vocab_size,
        "density": arguments.density,
        "block": arguments.block,
        "kernel": arguments.kernel,
        "sparse_head": arguments.sparse_head,
        "storage": arguments.storage,
        "attention_pattern": arguments.attention_pattern,
        "gives_back_memory": arguments.give_back_memory,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps_per_round": arguments.steps,
        "rounds": arguments.rounds,
        "dense_products": products_of,
        "dense_step_seconds": dense,
        "torch_step_seconds": medians.get("torch", dense),
        "sparse_step_seconds": sparse,
        "speedup_median": statistics.median(speedups["dense"]),
        "speedups": speedups["dense"],
        "speedup_median_over_torch": statistics.median(speedups.get("torch", speedups["dense"])),
        "speedups_over_torch": speedups.get("torch", speedups["dense"]),
        "dense_products_seconds": dense_products,
        "sparse_products_seconds": sparse_products,
        "products_speedup": dense_products / sparse_products,
        "ceiling_products_free": dense / rest,
        "ceiling_products_at_density": dense / (rest + arguments.density * dense_products),
        "dense_seconds_by_part": parts["dense"],
        "sparse_seconds_by_part": parts["sparse"],
        "torch_seconds_by_part": parts.get("torch", parts["dense"]),
    }
    suffix = f"{arguments.model}-{arguments.precision}-{arguments.kernel}" + ("-head" if arguments.sparse_head else "")
    suffix += "-packed" if arguments.storage == "packed" else ""
    suffix += "-given-back" if arguments.give_back_memory else ""
    path = write_result("train_step", {"results": [numbers]}, suffix=suffix, folder=arguments.results)
    print_parts(parts)
    print(f"dense products: {products_of}")
    for kind, found in speedups.items():
        named = "dense" if kind == "dense" else "dense by torch's products"
        print(f"step: {named} {medians[kind]:.4f} s, sparse {sparse:.4f} s, {statistics.median(found):.3f}x {found}")
    print(f"products: dense {dense_products:.4f} s, sparse {sparse_products:.4f} s")
    print(
        f"ceiling: {numbers['ceiling_products_free']:.3f}x with free products, "
        f"{numbers['ceiling_products_at_density']:.3f}x at density times dense; {path.name}"
    )


def ratios(dense: list[float], sparse: list[float]) -> list[float]:
    """Of each round."""
    return [round(d / s, 4) for d, s in zip(dense, sparse, strict=True)]


def print_parts(parts: dict[str, dict[str, float]]) -> None:
    print(f"{'seconds per step':24s}" + "".join(f" {kind:>9s}" for kind in parts))
    for name in dict.fromkeys(name for found in parts.values() for name in found):
        print(f"{name:24s}" + "".join(f" {found.get(name, 0.0):9.4f}" for found in parts.values()))


def parse_arguments() -> argparse.Namespace:
    kernels = get_args(KernelsConfig.model_fields["block_sparse"].annotation)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small-width")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--density", type=float, default=0.1, help="density of the sparse layers (default: 0.1)")
    parser.add_argument("--block", type=int, default=64, help="side of the blocks (default: 64)")
    parser.add_argument("--kernel", choices=kernels, default="auto", help="kernels.block_sparse (default: auto)")
    parser.add_argument("--storage", choices=("dense", "packed"), default="dense", help="sparsity.storage")
    parser.add_argument("--sparse-head", action="store_true", help="the head is sparse too, as in the paper")
    parser.add_argument(
        "--attention-pattern", choices=get_args(Pattern), default="full", help="of the sparse run (default: full)"
    )
    parser.add_argument(
        "--give-back-memory", action="store_true", help="freed memory goes back to the system, on a CPU"
    )
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step (default: 2048)")
    parser.add_argument("--steps", type=int, default=2, help="steps per round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each trainer (default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
