#!/usr/bin/env python3
"""Measures the block-sparse kernels on this machine against dense products, and keeps the break-even densities.

With kernels.block_sparse=auto, runs on this machine and with as many threads then choose by what was measured. Give the
number of threads of a rank: the deepspeed launcher sets OMP_NUM_THREADS=1 unless the environment says otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megasparse.data.command_line import run_tool
from megasparse.kernels.block_sparse.break_even import own_table
from megasparse.kernels.block_sparse.measure import LAYERS, parse_shape
from megasparse.training.console import make_console
from megasparse.training.kernel_tuning import cases, measure_all, print_rows, store
from megasparse.training.kernels import DTYPES, target_device

EXAMPLES = """examples:
  # the layers of GPT-2 small, all blocks, in a minute or two
  python tools/tune_kernels.py --quick

  # one layer, as a tensor-parallel rank sees it, with one thread
  OMP_NUM_THREADS=1 python tools/tune_kernels.py --shapes 768x1536 --blocks 64 --tokens 4096 --precisions fp32
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(LAYERS)
    parser.add_argument(
        "--shapes", nargs="+", default=["gpt2-small"], metavar="SHAPE", help=f"{names}, or in x out as 768x3072"
    )
    parser.add_argument("--blocks", nargs="+", type=int, default=[16, 32, 64, 128], metavar="N", help="sides of blocks")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[512, 2048, 8192], metavar="N", help="rows of a micro-batch"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times are medians over them (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="table to write to (default: that of the user)")
    parser.add_argument("--quick", action="store_true", help="the largest shape, 2,048 tokens and 2 rounds only")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    arguments = parser.parse_args()
    for name in ("blocks", "tokens", "rounds"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name}: {values} is not positive")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    device = arguments.device or target_device()
    shapes = [widths for words in arguments.shapes for widths in parse_shape(words)]
    tokens, rounds = arguments.tokens, arguments.rounds
    if arguments.quick:
        shapes, tokens, rounds = [max(shapes, key=lambda widths: widths[0] * widths[1])], [2048], 2
    todo, notes = cases(device, arguments.precisions, arguments.blocks, tokens, shapes)
    for note in notes:
        print(f"tune_kernels: passed over: {note}", file=sys.stderr)
    if not todo:
        raise ValueError("nothing of this can be measured here")
    measurement = measure_all(todo, device, rounds, f"tools/tune_kernels.py {' '.join(sys.argv[1:])}".strip())
    print_rows(measurement.rows, make_console())
    print(f"{measurement.hardware}, threads: {measurement.threads}")
    if not arguments.dry_run:
        path = arguments.output or own_table()
        store(path, measurement)
        print(f"{path} written")


if __name__ == "__main__":
    options = parse_arguments()
    sys.exit(run_tool("tune_kernels", lambda: main(options)))
