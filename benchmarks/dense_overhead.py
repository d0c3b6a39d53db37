"""What MegaSparse adds to a dense training step, against a plain PyTorch loop over the same model.

    python benchmarks/dense_overhead.py [--model quickstart] [--precision fp32] [--steps 12] [--rounds 5]

The loops run in one process and take turns: each round times a few steps of one, then of the other. A plain loop has
its batch ready; ours loads data, keeps the ledger, and goes through DeepSpeed. There are two plain loops: with the
kernels of our run, which shows what the rest costs (the goal is a ratio of at most 1.10), and with torch's own
operators and products (at most 1.00). What computes dense products is measured first, as a run does at its first start.
Medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from bench_setup import MODELS, RandomTokens, benchmark_config, open_trainer
from result_file import write_result

from megasparse.config.schema import RunConfig
from megasparse.data import Batch
from megasparse.engine.training_engine import DTYPES
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.models.build import build_model
from megasparse.objectives.objective import NextTokenCrossEntropy
from megasparse.training.plan import make_plan
from megasparse.tuning.first_start import fit_tables


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    keep_host_memory(os.environ)
    stage = 0 if arguments.precision == "fp32" else 1
    config = benchmark_config(
        arguments.model,
        "sparsity.algorithm=dense",
        f"train.precision={arguments.precision}",
        f"deepspeed.zero_stage={stage}",
        f"train.micro_batch_size={arguments.batch_size}",
        f"train.global_batch_size={arguments.batch_size}",
        "train.steps=100000",
    )
    fit_tables(config, make_plan(config, 1), tell=print, warn=print)
    kernels = config.kernels.model_copy(update=dict.fromkeys(("dense", "elementwise", "loss"), "torch"))
    with (
        open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh,
        open_trainer(config, mesh) as (trainer, loader),
    ):
        loops = {
            "plain": plain_loop(config),
            "torch": plain_loop(config.model_copy(update={"kernels": kernels})),
            "ours": lambda: trainer.train_step(loader),
        }
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(arguments.rounds + 1):
            for name, step in loops.items():
                seconds[name].append(seconds_per_step(step, arguments.steps))
        # The first round warms up caches and allocators.
        report(arguments, config, {name: found[1:] for name, found in seconds.items()})


def plain_loop(config: RunConfig) -> Callable[[], None]:
    """A dense training step as one would write it by hand; bfloat16 with float32 master weights in the optimizer."""
    model = build_model(config, config.model.vocab_size)
    dtype = DTYPES[config.train.precision]
    model.to(dtype)
    low = list(model.parameters())
    master = low if dtype == torch.float32 else [torch.nn.Parameter(p.detach().float()) for p in low]
    optimizer = torch.optim.AdamW(master, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    data = RandomTokens(config.model.vocab_size, config.model.seq_length)
    tokens = torch.stack([torch.from_numpy(data[number]) for number in range(config.train.micro_batch_size)])

    def step() -> None:
        NextTokenCrossEntropy()(model, Batch(tokens[:, :-1], tokens[:, 1:], None)).loss.backward()
        for copy, parameter in zip(master, low, strict=True):
            if copy is not parameter:
                copy.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for copy, parameter in zip(master, low, strict=True):
                if copy is not parameter:
                    parameter.copy_(copy)
                parameter.grad = None

    return step


def seconds_per_step(step: Callable[[], object], steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def report(arguments: argparse.Namespace, config: RunConfig, seconds: dict[str, list[float]]) -> None:
    plain, own_operators, ours = (statistics.median(seconds[name]) for name in ("plain", "torch", "ours"))
    ratios, over_torch = (
        [round(own / other, 4) for own, other in zip(seconds["ours"], seconds[name], strict=True)]
        for name in ("plain", "torch")
    )
    numbers = {
        "model": arguments.model,
        "precision": arguments.precision,
        "zero_stage": config.deepspeed.zero_stage,
        "threads": torch.get_num_threads(),
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "steps_per_round": arguments.steps,
        "rounds": arguments.rounds,
        "plain_seconds_per_step": plain,
        "torch_seconds_per_step": own_operators,
        "megasparse_seconds_per_step": ours,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "ratio_median_over_torch": statistics.median(over_torch),
        "ratios_over_torch": over_torch,
    }
    path = write_result("dense_overhead", {"results": [numbers]}, suffix=f"{arguments.model}-{arguments.precision}")
    print(f"a step: plain {plain:.4f} s, with torch's operators {own_operators:.4f} s, ours {ours:.4f} s")
    print(f"over plain {numbers['ratio_median']:.3f} {ratios}")
    print(f"over torch's operators {numbers['ratio_median_over_torch']:.3f} {over_torch}; {path.name}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of 256 tokens per step (default: 8)")
    parser.add_argument("--steps", type=int, default=12, help="steps per round (default: 12)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each loop (default: 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
