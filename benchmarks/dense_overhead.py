"""What MegaSparse adds to a dense training step, against a plain PyTorch loop over the same model.

    python benchmarks/dense_overhead.py [--model quickstart] [--precision fp32] [--steps 12] [--rounds 5]

Both loops run in one process and take turns: each round times a few steps of one, then of the other. The plain loop has
its batch ready; ours loads data, keeps the ledger, and goes through DeepSpeed. Medians over the rounds; the goal is a
ratio of at most 1.10.
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
from megasparse.launching import LaunchEnvironment, open_mesh
from megasparse.models.build import build_model
from megasparse.objectives.objective import NextTokenCrossEntropy


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
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
    with (
        open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh,
        open_trainer(config, mesh) as (trainer, loader),
    ):
        plain_step = plain_loop(config)
        plain, ours = [], []
        for _ in range(arguments.rounds + 1):
            plain.append(seconds_per_step(plain_step, arguments.steps))
            ours.append(seconds_per_step(lambda: trainer.train_step(loader), arguments.steps))
        # The first round warms up caches and allocators.
        report(arguments, config, plain[1:], ours[1:])


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


def report(arguments: argparse.Namespace, config: RunConfig, plain: list[float], ours: list[float]) -> None:
    ratios = [own / other for own, other in zip(ours, plain, strict=True)]
    numbers = {
        "model": arguments.model,
        "precision": arguments.precision,
        "zero_stage": config.deepspeed.zero_stage,
        "threads": torch.get_num_threads(),
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "steps_per_round": arguments.steps,
        "rounds": arguments.rounds,
        "plain_seconds_per_step": statistics.median(plain),
        "megasparse_seconds_per_step": statistics.median(ours),
        "ratio_median": statistics.median(ratios),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }
    path = write_result("dense_overhead", {"results": [numbers]}, suffix=f"{arguments.model}-{arguments.precision}")
    print(
        f"plain {numbers['plain_seconds_per_step']:.4f} s, ours {numbers['megasparse_seconds_per_step']:.4f} s a step"
    )
    print(f"ratio {numbers['ratio_median']:.3f} (rounds: {numbers['ratios']}); {path.name}")


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
