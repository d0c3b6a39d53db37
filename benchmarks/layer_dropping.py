"""A training step with layer dropping against one with all layers, in seconds and by the ledger.

    python benchmarks/layer_dropping.py [--theta 0.5] [--model gpt2-small-width] [--precision bf16]

Two trainers stand side by side in one process and take turns. Theta has fallen before the first step, so that the steps
of all rounds cost the same in the mean; which branches each step drops is drawn, so the seconds of the same steps are
compared with the FLOPs that the ledger counted for them. The head and what lies outside of the blocks is never dropped.
"""

from __future__ import annotations

import argparse
import os
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_setup import MODELS, SIZES, benchmark_config, open_trainer, seconds_per_step
from result_file import RESULTS, write_result

from megasparse.config.schema import RunConfig
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh


def main() -> None:
    arguments = parse_arguments()
    os.environ["DS_ACCELERATOR"] = arguments.device
    if arguments.device == "cpu":
        keep_host_memory(os.environ)
    configs = {
        "all": make_config(arguments),
        "dropping": make_config(arguments, f"layer_dropping.theta={arguments.theta}"),
    }
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh, ExitStack() as stack:
        runs = {name: stack.enter_context(open_trainer(config, mesh)) for name, config in configs.items()}
        rows: list[dict[str, Any]] = []
        for _ in range(arguments.rounds + 1):
            row = {}
            for name, (trainer, loader) in runs.items():
                before = trainer.state.ledger.flops.executed
                seconds = seconds_per_step(trainer, loader, arguments.steps)
                row[name] = (seconds, (trainer.state.ledger.flops.executed - before) / arguments.steps)
            rows.append({part: row["dropping"][n] / row["all"][n] for n, part in enumerate(("seconds", "flops"))})
        # The first round warms up caches and allocators.
        numbers = {
            **{part: statistics.median(row[part] for row in rows[1:]) for part in ("seconds", "flops")},
            "seconds_over_flops": statistics.median(row["seconds"] / row["flops"] for row in rows[1:]),
            "rounds": rows[1:],
            "threads": torch.get_num_threads(),
        }
        for part in ("seconds", "flops", "seconds_over_flops"):
            print(f"{part:20s} {numbers[part]:.3f}")
        suffix = f"{arguments.model}-{arguments.precision}"
        print(write_result("layer_dropping", numbers, suffix=suffix, folder=arguments.results).name)


def make_config(arguments: argparse.Namespace, *words: str) -> RunConfig:
    length, vocabulary = SIZES[arguments.model]
    samples = max(arguments.tokens // length, 1)
    return benchmark_config(
        arguments.model,
        "sparsity.algorithm=dense",
        "attention.phases={}",
        f"model.num_layers={arguments.layers}",
        f"model.seq_length={length}",
        f"model.vocab_size={vocabulary}",
        f"train.precision={arguments.precision}",
        f"train.micro_batch_size={samples}",
        f"train.global_batch_size={samples}",
        "train.steps=2000000",
        *([*words, "layer_dropping.gamma=1000"] if words else []),
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt2-small-width")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--theta", type=float, default=0.5, help="probability of the last block (default: 0.5)")
    parser.add_argument("--layers", type=int, default=12, help="transformer blocks (default: 12)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step (default: 2048)")
    parser.add_argument("--steps", type=int, default=4, help="steps per round (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each trainer (default: 5)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
