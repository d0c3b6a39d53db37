"""The products of a block-sparse linear layer against dense ones and against peers, side by side.

    python benchmarks/block_sparse_linear.py --shapes gpt2-small --tokens 2048 --precision fp32
    python benchmarks/block_sparse_linear.py --shapes 768x3072 3072x768 --blocks 64 --densities 0.05 0.1 0.5 1

A shape is in x out. In each round every contender makes forward product, input gradient and weight gradient (with the
bias and its gradient), in turn, on the same random blocks; numbers are medians over the rounds. Speed-up is dense time
over ours; the efficiency e is the speed-up times the density: 1 where an active weight costs what a dense one does. The
break-even density is where the speed-up of the total falls to 1, interpolated between the measured ones. `autograd` is
the same through the layer, as training runs it. With `--storage packed` the same kernels run on packed storage too, in
the same rounds; how much faster they are there is told beside. `--clock cpu` counts seconds of processors instead of
elapsed ones, which other processes on the machine disturb less. Peers: torch's BSR tensors (forward and input gradient;
it has no weight gradient on sparse blocks, so that is dense and masked), and stk on CUDA where it is installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from result_file import write_result

from megasparse.kernels.block_sparse import (
    BlockIndex,
    apply_mask_,
    assign_slots,
    build_index,
    choose,
    pack,
    packed_linear,
    sparse_linear,
)
from megasparse.kernels.block_sparse.linear import PRODUCTS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# in x out of qkv, attention output, MLP up and down; Llama: query, up and down.
SHAPES = {
    "gpt2-small": ["768x2304", "768x768", "768x3072", "3072x768"],
    "gpt2-medium": ["1024x3072", "1024x1024", "1024x4096", "4096x1024"],
    "gpt2-xl": ["1600x4800", "1600x1600", "1600x6400", "6400x1600"],
    "llama-7b": ["4096x4096", "4096x11008", "11008x4096"],
}
PARTS = ("forward", "input_gradient", "weight_gradient")

Contender = dict[str, Callable[[], object]]


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    shapes = [shape for name in arguments.shapes for shape in SHAPES.get(name, [name])]
    results = []
    for shape in shapes:
        in_features, out_features = (int(width) for width in shape.split("x"))
        for block in arguments.blocks:
            if in_features % block or out_features % block:
                print(f"{shape}: blocks of {block} do not fit")
                continue
            rows = [measure(arguments, in_features, out_features, block, density) for density in arguments.densities]
            result = {"shape": shape, "block": block, "break_even_density": break_even(rows), "densities": rows}
            results.append(result)
            print(f"{shape}, blocks of {block}: break-even density {result['break_even_density']:.2f}", flush=True)
    facts = {
        "tokens": arguments.tokens,
        "precision": arguments.precision,
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "rounds": arguments.rounds,
        "results": results,
    }
    suffix = f"{'-'.join(arguments.shapes)}-{arguments.precision}-{arguments.tokens}"
    if not arguments.dry_run:
        print(write_result("block_sparse_linear", facts, suffix=suffix).name)


def measure(arguments: argparse.Namespace, in_features: int, out_features: int, block: int, density: float) -> dict:
    """All contenders on one random topology; seconds by part, speed-ups and efficiencies."""
    index, contenders = build(arguments, in_features, out_features, block, density)
    seconds = {name: {part: [] for part in parts} for name, parts in contenders.items()}
    for round_number in range(arguments.rounds + 1):
        for name, parts in contenders.items():
            for part, function in parts.items():
                elapsed = timed(function, arguments)
                if round_number:  # the first round warms up
                    seconds[name][part].append(elapsed)
    medians = {
        name: {part: statistics.median(values) for part, values in parts.items()} for name, parts in seconds.items()
    }
    for parts in medians.values():
        parts["total"] = sum(parts[part] for part in PARTS)
    ours, dense = medians["megasparse"], medians["dense"]
    speedup = {part: dense[part] / ours[part] for part in (*PARTS, "total", "autograd")}
    packed = {part: ours[part] / medians["packed"][part] for part in speedup} if "packed" in medians else {}
    row = {
        "density": index.density,
        "kernel": arguments.kernel,
        "seconds": medians,
        "speedup": speedup,
        **({"speedup_over_dense_storage": packed} if packed else {}),
        "efficiency": {part: value * index.density for part, value in speedup.items()},
        "gigaflops": 6e-9 * arguments.tokens * index.num_active * block**2 / ours["total"],
        "dense_gigaflops": 6e-9 * arguments.tokens * in_features * out_features / dense["total"],
    }
    peers = ", ".join(
        f"{name} {dense['total'] / parts['total']:.2f}x"
        for name, parts in medians.items()
        if name not in ("megasparse", "packed", "dense")
    )
    print(
        f"{in_features}x{out_features}, block {block}, density {index.density:.3f}: "
        + ", ".join(f"{part} {speedup[part]:.2f}x" for part in speedup)
        + f"; e {row['efficiency']['total']:.2f}; {row['gigaflops']:.0f} GFLOP/s, dense {row['dense_gigaflops']:.0f}"
        + (f"; peers: {peers}" if peers else "")
        + ("; packed, against dense storage: " if packed else "")
        + ", ".join(f"{part} {value:.2f}x" for part, value in packed.items()),
        flush=True,
    )
    return row


def build(
    arguments: argparse.Namespace, in_features: int, out_features: int, block: int, density: float
) -> tuple[BlockIndex, dict[str, Contender]]:
    device, dtype, tokens = arguments.device, DTYPES[arguments.precision], arguments.tokens
    grid = out_features // block, in_features // block
    num_units = grid[0] * grid[1]
    active = torch.randperm(num_units)[: max(round(density * num_units), 1)]
    mask = torch.zeros(num_units, dtype=torch.bool).index_fill_(0, active, True).view(grid).to(device)
    index = build_index(mask, block)
    x, dy = (torch.randn(tokens, width, device=device).to(dtype) for width in (in_features, out_features))
    dense_weight = torch.randn(out_features, in_features, device=device).to(dtype)
    weight = apply_mask_(dense_weight.clone(), mask, block)
    bias = torch.randn(out_features, device=device).to(dtype)
    kernel = arguments.kernel
    if kernel == "auto":
        kernel = choose("auto", x.device.type, dtype, block, tokens, min(index.density, 0.05))
    products = PRODUCTS[kernel]

    contenders: dict[str, Contender] = {
        "megasparse": {
            "forward": lambda: products.forward(x, weight, bias, index),
            "input_gradient": lambda: products.backward(dy, x, weight, index, (True, False, False)),
            "weight_gradient": lambda: products.backward(dy, x, weight, index, (False, True, True)),
            "autograd": through_autograd(lambda x, w, b: sparse_linear(x, w, b, index, kernel=kernel), x, weight, bias),
        },
        "dense": {
            "forward": lambda: F.linear(x, dense_weight, bias),
            "input_gradient": lambda: dy @ dense_weight,
            "weight_gradient": lambda: (dy.t() @ x, dy.sum(0)),
            "autograd": through_autograd(F.linear, x, dense_weight, bias),
        },
    }
    if arguments.storage == "packed":
        contenders["packed"] = packed_storage(x, dy, weight, bias, mask, block, kernel)
    if "bsr" in arguments.peers:
        contenders["torch_bsr"] = torch_bsr(x, dy, weight, bias, index)
    if "stk" in arguments.peers:
        contenders["stk"] = stk(x, dy, weight, bias, index)
    return index, contenders


def packed_storage(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor,
    block: int,
    kernel: str,
) -> Contender:
    """The same kernels on the active blocks alone, in slots of random order."""
    slots = assign_slots(mask, int(mask.sum()))
    slots = slots[torch.randperm(len(slots)).to(slots.device)]
    blocks, index, products = pack(weight, slots, block), build_index(mask, block, slot_blocks=slots), PRODUCTS[kernel]
    return {
        "forward": lambda: products.forward(x, blocks, bias, index),
        "input_gradient": lambda: products.backward(dy, x, blocks, index, (True, False, False)),
        "weight_gradient": lambda: products.backward(dy, x, blocks, index, (False, True, True)),
        "autograd": through_autograd(lambda x, w, b: packed_linear(x, w, b, index, kernel), x, blocks, bias),
    }


def through_autograd(layer: Callable, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Callable:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, weight, bias)]
    dy = torch.randn(x.shape[0], len(bias), device=x.device).to(x.dtype)

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(*leaves).backward(dy)

    return step


def torch_bsr(
    x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, index: BlockIndex
) -> Contender:
    block = (index.block_size, index.block_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse BSR tensor support is in beta state"
        bsr, transposed = weight.to_sparse_bsr(block), weight.t().contiguous().to_sparse_bsr(block)
    return {
        "forward": lambda: F.linear(x, bsr) + bias,
        "input_gradient": lambda: F.linear(dy, transposed),
        "weight_gradient": lambda: (apply_mask_(dy.t() @ x, index.mask, index.block_size), dy.sum(0)),
    }


def stk(x: torch.Tensor, dy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, index: BlockIndex) -> Contender:
    """stanford-stk: blocks of 128, float16 and bfloat16, CUDA."""
    import stk

    sparse = stk.ops.to_sparse(weight, blocking=index.block_size)
    return {
        "forward": lambda: stk.ops.dds(x, sparse.t()) + bias,
        "input_gradient": lambda: stk.ops.dds(dy, sparse),
        "weight_gradient": lambda: (stk.ops.sdd(dy.t(), x, sparse), dy.sum(0)),
    }


def timed(function: Callable[[], object], arguments: argparse.Namespace) -> float:
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    started = clock()
    function()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def break_even(rows: list[dict]) -> float:
    """Density at which the speed-up of the total is 1, on straight lines between the measured densities."""
    points = sorted((row["density"], row["speedup"]["autograd"]) for row in rows)
    for (low, faster), (high, slower) in zip(points, points[1:], strict=False):
        if faster >= 1 > slower:
            return low + (high - low) * (faster - 1) / (faster - slower)
    return points[-1][0] if points[-1][1] >= 1 else 0.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["gpt2-small"], help=f"in x out, or {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2, 0.5, 0.8, 1.0])
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--kernel", default="auto", help="a forced kernel (default: the fastest one here)")
    parser.add_argument(
        "--storage", choices=("dense", "packed"), default="dense", help="packed: packed storage besides"
    )
    parser.add_argument("--clock", choices=("elapsed", "cpu"), default="elapsed", help="seconds that are counted")
    parser.add_argument("--peers", nargs="*", choices=("bsr", "stk"), default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "0")))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
