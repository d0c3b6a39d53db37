"""Dense linear layers on a CPU in float32: torch's own product, oneDNN's, and our block kernel with all blocks active.

    python benchmarks/dense_products.py --shapes 768x3072 3072x768 --tokens 1024 2048 [--threads 1] [--cpu-seconds]

A shape is in x out. In each round every product makes a forward and backward pass through autograd, in turn; numbers
are GFLOP/s of the fastest round. --cpu-seconds: by the CPU time of the process in place of the clock, for a machine
that does other work; with one thread only, as threads that wait for each other count too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from result_file import write_result
from torch import Tensor

from megasparse.kernels.block_sparse import build_index, sparse_linear
from megasparse.kernels.common.medians import training_pass
from megasparse.kernels.dense_products.table import PRODUCTS

BLOCK = 64


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    results = []
    for shape in arguments.shapes:
        widths = tuple(int(width) for width in shape.split("x"))
        for tokens in arguments.tokens:
            rates = measure(widths, tokens, arguments.rounds, clock)
            results.append({"shape": shape, "tokens": tokens, "gflop_per_second": rates})
            print(f"{shape}, {tokens:,} tokens: {rates}", flush=True)
    facts = {"threads": arguments.threads, "clock": "CPU time" if arguments.cpu_seconds else "wall", "block": BLOCK}
    print(write_result("dense_products", {**facts, "results": results}, suffix=f"{arguments.threads}-threads").name)


def measure(widths: tuple[int, ...], tokens: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """GFLOP/s by product, of the three products of a layer."""
    inner, outer = widths
    x, weight, dy = torch.randn(tokens, inner), torch.randn(outer, inner), torch.randn(tokens, outer)
    passes = {name: training_pass(product, (x, weight), dy) for name, product in contenders(widths).items()}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds + 1):
        for name, run in passes.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    # The first round warms up.
    return {name: round(6e-9 * tokens * inner * outer / min(found[1:]), 1) for name, found in seconds.items()}


def contenders(widths: tuple[int, ...]) -> dict[str, Callable[..., Tensor]]:
    inner, outer = widths
    if inner % BLOCK or outer % BLOCK:
        return dict(PRODUCTS)
    index = build_index(torch.ones(outer // BLOCK, inner // BLOCK, dtype=torch.bool), BLOCK)
    return {**PRODUCTS, "ours": partial(sparse_linear, bias=None, index=index, kernel="cpu")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["128x512", "768x3072", "3072x768", "768x50304"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=4, help="rounds of each product (default: 4)")
    parser.add_argument("--cpu-seconds", action="store_true", help="by CPU time in place of the clock")
    arguments = parser.parse_args()
    if arguments.cpu_seconds and arguments.threads > 1:
        parser.error("--cpu-seconds: needs --threads 1")
    return arguments


if __name__ == "__main__":
    main()
