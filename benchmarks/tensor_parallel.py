"""What tensor parallelism adds to the compute of a rank: one block over two ranks against half the block on each.

    torchrun --standalone --nproc-per-node 2 benchmarks/tensor_parallel.py [--hidden-size 1600] [--tokens 1024]

Both ranks run forward and backward passes of one transformer block, divided between them, and of the same half of it
without any communication, in turn, in one program. The widths are GPT-2 XL's; its 25 heads of 64 do not divide by two,
so there are 20 of 80. Medians over the rounds of the slower rank; the goal is a ratio of at most 1.08.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
from result_file import write_result

from megasparse.config.schema import AttentionConfig, ModelConfig
from megasparse.launching import LaunchEnvironment, keep_host_memory, open_mesh
from megasparse.layers import LayerFactory, SparseSpec
from megasparse.models.gpt import Block
from megasparse.parallel import CommunicationGroup, Mesh, TensorParallel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SilentAxis(CommunicationGroup):
    """An axis whose collectives do nothing: the half of the block, alone."""

    def sum_(self, tensor):
        return tensor

    def gather(self, tensor):
        return tensor.unsqueeze(0).expand(self.size, *tensor.shape)

    def scatter_sum(self, tensor):
        return tensor[self.rank]


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    keep_host_memory(os.environ)
    with open_mesh(LaunchEnvironment.from_variables(os.environ), 600, 2) as mesh:
        result = measure(arguments, mesh)
        if mesh.is_first:
            print(
                f"block of two ranks {result['divided_seconds']:.4f} s, half a block alone "
                f"{result['half_seconds']:.4f} s: ratio {result['ratio']:.4f} (of single rounds "
                f"{result['smallest_ratio']:.3f} to {result['largest_ratio']:.3f})"
            )
            suffix = f"{arguments.hidden_size}-{arguments.precision}" + ("-sequence" * arguments.sequence_parallel)
            print(write_result("tensor_parallel", result, suffix=suffix).name)
        mesh.barrier()


def measure(arguments: argparse.Namespace, mesh: Mesh) -> dict:
    axis = mesh.tensor_parallel
    divided = build(arguments, TensorParallel(axis, arguments.sequence_parallel))
    half = build(arguments, TensorParallel(SilentAxis(axis.rank, axis.size), arguments.sequence_parallel))
    tokens = arguments.tokens // (axis.size if arguments.sequence_parallel else 1)
    x = torch.randn(1, tokens, arguments.hidden_size, dtype=DTYPES[arguments.precision], requires_grad=True)
    seconds: dict[str, list[float]] = {"divided": [], "half": []}
    for round_number in range(arguments.rounds + 2):
        for name, block in (("divided", divided), ("half", half)):
            mesh.barrier()
            started = time.perf_counter()
            block(x).sum().backward()
            own = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
            slowest = float(mesh.control.max_(own))
            if round_number >= 2:
                seconds[name].append(slowest)
    ratios = [a / b for a, b in zip(seconds["divided"], seconds["half"], strict=True)]
    return {
        "hidden_size": arguments.hidden_size,
        "tokens": arguments.tokens,
        "precision": arguments.precision,
        "sequence_parallel": arguments.sequence_parallel,
        "threads_per_rank": torch.get_num_threads(),
        "divided_seconds": statistics.median(seconds["divided"]),
        "half_seconds": statistics.median(seconds["half"]),
        "ratio": statistics.median(seconds["divided"]) / statistics.median(seconds["half"]),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "goal": 1.08,
    }


def build(arguments: argparse.Namespace, ranks: TensorParallel) -> Block:
    config = ModelConfig(hidden_size=arguments.hidden_size, num_attention_heads=20, seq_length=arguments.tokens)
    factory = LayerFactory(lambda name: SparseSpec(arguments.block_size), tensor_parallel=ranks)
    block = Block("layers.0", config, AttentionConfig(), factory, "auto")
    return block.to(DTYPES[arguments.precision])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1600)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--rounds", type=int, default=9, help="rounds that are timed (default: 9)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
