"""An MLP as a mixture of its clusters of neurons against the same MLP dense, forward and backward, in seconds.

    python benchmarks/clustered_mlp.py [--tokens 2048] [--width 768] [--clusters 16] [--active 4] [--precision fp32]

Both take turns in one process; numbers are medians, and the ratio that of each round. The share of the neurons is the
least that the ratio can be: what lies above it are the gathered tokens and the smaller products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from bench_setup import benchmark_config
from result_file import RESULTS, write_result

from megasparse.layers import MLP
from megasparse.layers.clustered_mlp import ClusteredMLP
from megasparse.methods.neuron_clusters import centroids
from megasparse.models import build_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    arguments = parse_arguments()
    config = benchmark_config(
        "gpt2-small-width",
        "sparsity.algorithm=dense",
        "attention.phases={}",
        "model.num_layers=1",
        f"model.hidden_size={arguments.width}",
        "model.activation=relu2",
        "model.vocab_size=256",
    )
    dtype = DTYPES[arguments.precision]
    mlp = build_model(config, 256).layers[0].mlp.to(dtype)
    rows = mlp.up.weight.detach().float()
    labels = torch.arange(arguments.clusters).repeat_interleave(len(rows) // arguments.clusters)
    mixture = ClusteredMLP(centroids(rows, labels, arguments.clusters), arguments.active, 1)
    x = torch.randn(1, arguments.tokens, arguments.width, dtype=dtype, requires_grad=True)
    rounds = []
    for _ in range(arguments.rounds + 2):
        row = {}
        for name, form in (("dense", None), ("mixture", mixture)):
            mlp.in_training = form
            row[name] = seconds(mlp, x)
        rounds.append(row)
    # The first rounds choose kernels and fill allocators.
    rounds = rounds[2:]
    numbers = {
        "dense": statistics.median(row["dense"] for row in rounds),
        "mixture": statistics.median(row["mixture"] for row in rounds),
        "ratio": statistics.median(row["mixture"] / row["dense"] for row in rounds),
        "share": arguments.active / arguments.clusters,
        "threads": torch.get_num_threads(),
    }
    for name, number in numbers.items():
        print(f"{name:10s} {number:.4f}")
    suffix = f"{arguments.tokens}-{arguments.width}-{arguments.clusters}-{arguments.active}-{arguments.precision}"
    print(write_result("clustered_mlp", numbers, suffix=suffix, folder=arguments.results).name)


def seconds(mlp: MLP, x: torch.Tensor) -> float:
    mlp.zero_grad()
    x.grad = None
    start = time.perf_counter()
    mlp(x).sum().backward()
    return time.perf_counter() - start


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens (default: 2048)")
    parser.add_argument("--width", type=int, default=768, help="hidden size (default: 768)")
    parser.add_argument("--clusters", type=int, default=16, help="clusters of neurons (default: 16)")
    parser.add_argument("--active", type=int, default=4, help="clusters per token (default: 4)")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each (default: 11)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
