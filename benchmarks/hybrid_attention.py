"""Hybrid sparse attention against dense and masked attention, side by side.

    python benchmarks/hybrid_attention.py --lengths 512 1024 4096 --patterns sparse --precision fp32
    python benchmarks/hybrid_attention.py --lengths 1024 8192 32768 --precision bf16 --device cuda

In each round every contender makes a forward and a backward pass, in turn, on the same inputs; numbers are medians over
the rounds. Contenders: our kernel, causal scaled_dot_product_attention (flash where it supports the input), the same
with the pattern as a boolean mask (up to --longest-mask tokens), and on CUDA compiled FlexAttention with the same
pattern. Speed-up is the contender's time over ours, so causal attention says what the pattern gains over no pattern.
On CUDA a pass is timed from an idle device to an idle device, with what the host takes to launch it: take enough
--samples for short sequences.
GFLOP/s are those of our kernel on active entries: 4 D for each forward, 10 D backward (scores are made again).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from result_file import write_result

from megasparse.kernels.hybrid_attention import (
    PATTERNS,
    active_entries,
    executed_entries,
    hybrid_attention,
    pattern_mask,
    select_kernel,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    results = [
        measure(arguments, seq_length, pattern) for seq_length in arguments.lengths for pattern in arguments.patterns
    ]
    facts = {
        "samples": arguments.samples,
        "heads": arguments.heads,
        "head_dim": arguments.head_dim,
        "stride": arguments.stride,
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "rounds": arguments.rounds,
        "results": results,
    }
    suffix = f"{'-'.join(map(str, arguments.lengths))}-{arguments.precision}"
    if not arguments.dry_run:
        print(write_result("hybrid_attention", facts, suffix=suffix).name)


def measure(arguments: argparse.Namespace, seq_length: int, pattern: str) -> dict:
    """All contenders under one pattern; median seconds by direction, and our speed-up over each."""
    # Heads of a token lie together, as the projection of a layer leaves them.
    shape = arguments.samples, seq_length, arguments.heads, arguments.head_dim
    dtype, device = DTYPES[arguments.precision], arguments.device
    q, k, v, dy = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    seconds: dict[str, dict[str, list[float]]] = {}
    contenders = build(arguments, seq_length, pattern)
    for round_number in range(arguments.rounds + 1):
        for name, attention in contenders.items():
            elapsed = timed(attention, inputs, dy)
            if round_number:  # the first round warms up
                for direction, value in elapsed.items():
                    seconds.setdefault(name, {}).setdefault(direction, []).append(value)
    medians = {
        name: {direction: statistics.median(values) for direction, values in directions.items()}
        for name, directions in seconds.items()
    }
    ours = medians["megasparse"]
    speedup = {
        name: {direction: value / ours[direction] for direction, value in directions.items()}
        for name, directions in medians.items()
        if name != "megasparse"
    }
    entries = pattern, seq_length, arguments.stride
    place = arguments.device, dtype, arguments.head_dim
    kernel = select_kernel(arguments.kernel, *entries, *place)
    per_entry = {"forward": 4, "backward": 10, "total": 14}
    operations = active_entries(*entries) * arguments.samples * arguments.heads * arguments.head_dim
    gflops = {direction: factor * operations / ours[direction] / 1e9 for direction, factor in per_entry.items()}
    print(
        f"T {seq_length}, {pattern} ({kernel}): {1e3 * ours['total']:.1f} ms, {gflops['total']:.0f} GFLOP/s; "
        "faster than "
        + "; ".join(
            f"{name} forward {values['forward']:.2f}x, backward {values['backward']:.2f}x, total {values['total']:.2f}x"
            for name, values in speedup.items()
        ),
        flush=True,
    )
    return {
        "seq_length": seq_length,
        "pattern": pattern,
        "kernel": kernel,
        "active_entries": active_entries(*entries),
        "executed_entries": executed_entries(arguments.kernel, *entries, *place),
        "seconds": medians,
        "gflops": gflops,
        "speedup": speedup,
    }


def build(arguments: argparse.Namespace, seq_length: int, pattern: str) -> dict[str, Attention]:
    stride, device = arguments.stride, arguments.device
    contenders: dict[str, Attention] = {
        "megasparse": lambda q, k, v: hybrid_attention(q, k, v, pattern, stride, arguments.kernel),
        "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if pattern != "full" and seq_length <= arguments.longest_mask:
        mask = pattern_mask(pattern, seq_length, stride, device)
        contenders["mask"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if device == "cuda":  # it has no backward pass on a CPU
        contenders["flex"] = flex(pattern, seq_length, stride)
    return contenders


def flex(pattern: str, seq_length: int, stride: int) -> Attention:
    """FlexAttention, compiled, with the pattern as its mask function."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    conditions = {
        "full": lambda query, key: query >= key,
        "local": lambda query, key: query - key < stride,
        "strided": lambda query, key: (query - key) % stride == 0,
        "sparse": lambda query, key: (query - key < stride) | ((query - key) % stride == 0),
        "fixed": lambda query, key: (query // stride == key // stride) | (key % stride == stride - 1),
    }
    condition = conditions[pattern]

    def sees(sample, head, query, key):
        return (query >= key) & condition(query, key)

    block_mask = create_block_mask(sees, None, None, seq_length, seq_length, device="cuda")
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask)


def timed(attention: Attention, inputs: list[torch.Tensor], dy: torch.Tensor) -> dict[str, float]:
    started = now(dy)
    y = attention(*inputs)
    between = now(dy)
    torch.autograd.grad(y, inputs, dy)
    ended = now(dy)
    return {"forward": between - started, "backward": ended - between, "total": ended - started}


def now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="tokens (default: 512 to 4,096 by twos, on CUDA to 32,768)"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["local", "strided", "sparse", "fixed"])
    parser.add_argument("--stride", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--kernel", default="auto", help="a forced kernel (default: the fastest one here)")
    parser.add_argument("--longest-mask", type=int, default=8192, help="most tokens for which a T x T mask is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    arguments = parser.parse_args()
    if arguments.lengths is None:
        arguments.lengths = [512 * 2**power for power in range(7 if arguments.device == "cuda" else 4)]
    return arguments


if __name__ == "__main__":
    main()
