"""What a topology update costs, in ordinary optimizer steps.

    python benchmarks/topology_step.py [--model quickstart] [--precision fp32] [--rounds 9]

In the ultra-sparse phase every third step changes the topology. The cost is the median duration of these steps (the
dense weight gradient, the decision and the edits included) less that of the others, over that of the others. Measured
for blocks and for single weights; the goal is below 2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

from bench_setup import MODELS, benchmark_config, open_trainer
from result_file import write_result

from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh

UPDATE_INTERVAL = 3


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    keep_host_memory(os.environ)
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600) as mesh:
        results = [measure(arguments, block_size, mesh) for block_size in arguments.block_sizes]
    path = write_result("topology_step", {"results": results}, suffix=f"{arguments.model}-{arguments.precision}")
    for result in results:
        print(
            f"blocks of {result['block_size']}: ordinary step {result['ordinary_step_seconds']:.4f} s, topology update "
            f"{result['topology_step_seconds']:.4f} s, cost {result['cost_in_ordinary_steps']:.3f} ordinary steps"
        )
    print(path.name)


def measure(arguments: argparse.Namespace, block_size: int, mesh) -> dict:
    config = benchmark_config(
        arguments.model,
        "sparsity.algorithm=rigl",
        f"sparsity.block_size={block_size}",
        f"sparsity.update_interval={UPDATE_INTERVAL}",
        f"train.precision={arguments.precision}",
        "train.micro_batch_size=8",
        "train.global_batch_size=16",
        "train.steps=100000",
    )
    ordinary, changing, deciding = [], [], []
    with open_trainer(config, mesh) as (trainer, loader):
        for step in range((arguments.rounds + 1) * UPDATE_INTERVAL):
            started = time.perf_counter()
            result = trainer.train_step(loader)
            seconds = time.perf_counter() - started
            if step < UPDATE_INTERVAL:
                continue
            (changing if result.records else ordinary).append(seconds)
            if result.records:
                deciding.append(result.records["topology"][0]["seconds"])
        parameters = sum(topology.numel for topology in trainer.methods[0].controller.topologies.values())
    usual, slow = statistics.median(ordinary), statistics.median(changing)
    return {
        "model": arguments.model,
        "precision": arguments.precision,
        "block_size": block_size,
        "sparse_parameters": parameters,
        "tokens_per_step": config.train.global_batch_size * config.model.seq_length,
        "ordinary_step_seconds": usual,
        "topology_step_seconds": slow,
        "decision_seconds": statistics.median(deciding),
        "cost_in_ordinary_steps": (slow - usual) / usual,
        "share_of_time_at_interval_100": (slow - usual) / (100 * usual),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="quickstart")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--block-sizes", type=int, nargs="+", default=[32, 1], help="sides of the blocks (default: 32 1)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="topology updates that are timed (default: 9)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
