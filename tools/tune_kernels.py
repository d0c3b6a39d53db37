#!/usr/bin/env python3
"""Measures the kernels on this machine against dense products, and keeps where they break even.

Without --attention: the block-sparse layers, and the densities up to which they are faster. With it: the attention
patterns, and the numbers of tokens from which they are. With kernels.block_sparse=auto (kernels.hybrid_attention=auto),
runs on this machine and with as many threads then choose by what was measured. Give the number of threads of a rank:
the deepspeed launcher sets OMP_NUM_THREADS=1 unless the environment says otherwise.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megasparse.cost.layer_kernels import DTYPES, target_device
from megasparse.data.arguments import positive, run_tool, tool_parser
from megasparse.kernels.block_sparse.break_even import TABLE as LAYERS_TABLE
from megasparse.kernels.block_sparse.measure import LAYERS, parse_shape
from megasparse.kernels.common.tables import Measurement
from megasparse.kernels.hybrid_attention.break_even import TABLE as ATTENTION_TABLE
from megasparse.kernels.hybrid_attention.measure import LENGTHS
from megasparse.launching import keep_host_memory
from megasparse.monitoring.console import make_console
from megasparse.tuning import kernel_tuning as tuning

EXAMPLES = """examples:
  # the layers of GPT-2 small, all blocks, in a minute or two
  python tools/tune_kernels.py --quick

  # one layer, as a tensor-parallel rank sees it, with one thread
  OMP_NUM_THREADS=1 python tools/tune_kernels.py --shapes 768x1536 --blocks 64 --tokens 4096 --precisions fp32

  # the attention patterns, with heads of 64 and of 128
  python tools/tune_kernels.py --attention --head-dims 64 128
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    shapes = f"{', '.join(LAYERS)}, or in x out as 768x3072"
    parser.add_argument("--shapes", nargs="+", default=["gpt2-small"], metavar="SHAPE", help=shapes)
    counts = {"nargs": "+", "type": positive, "metavar": "N"}
    parser.add_argument("--blocks", default=[16, 32, 64, 128], help="sides", **counts)
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="default: fp32 bf16")
    parser.add_argument("--tokens", default=[512, 2048, 8192], help="rows of a micro-batch", **counts)
    attention = parser.add_argument_group("with --attention")
    attention.add_argument("--attention", action="store_true", help="measure the attention patterns instead of layers")
    attention.add_argument("--strides", default=[128], help="default: 128", **counts)
    attention.add_argument("--head-dims", default=[64], help="default: 64", **counts)
    attention.add_argument("--lengths", default=list(LENGTHS), help="tokens of a sequence", **counts)
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="medians are over them (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--output", type=Path, metavar="FILE", help="table to write to (default: that of the user)")
    quick = "2 rounds; the largest shape and 2,048 tokens, or the two outer lengths, only"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    device = arguments.device or target_device()
    if device == "cpu":
        keep_host_memory(os.environ)
    if arguments.attention:
        measurement, table = tune_attention(arguments, device), ATTENTION_TABLE
        tuning.print_attention_rows(measurement.rows, make_console())
    else:
        measurement, table = tune_layers(arguments, device), LAYERS_TABLE
        tuning.print_rows(measurement.rows, make_console())
    print(f"{measurement.hardware}, threads: {measurement.threads}")
    if not arguments.dry_run:
        path = arguments.output or table.own()
        tuning.store(path, measurement, table)
        print(f"{path} written")


def tune_layers(arguments: argparse.Namespace, device: str) -> Measurement:
    shapes = [widths for words in arguments.shapes for widths in parse_shape(words)]
    tokens, rounds = arguments.tokens, arguments.rounds
    if arguments.quick:
        shapes, tokens, rounds = [max(shapes, key=lambda widths: widths[0] * widths[1])], [2048], 2
    todo, notes = tuning.cases(device, arguments.precisions, arguments.blocks, tokens, shapes)
    for note in notes:
        print(f"tune_kernels: passed over: {note}", file=sys.stderr)
    if not todo:
        raise ValueError("nothing of this can be measured here")
    return tuning.measure_all(todo, device, rounds, command())


def tune_attention(arguments: argparse.Namespace, device: str) -> Measurement:
    lengths, rounds = arguments.lengths, arguments.rounds
    if arguments.quick:
        lengths, rounds = [min(lengths), max(lengths)], 2
    classes = arguments.precisions, arguments.strides, arguments.head_dims
    return tuning.measure_attention(device, *classes, lengths=lengths, rounds=rounds, command=command())


def command() -> str:
    return f"tools/tune_kernels.py {' '.join(sys.argv[1:])}".strip()


if __name__ == "__main__":
    options = parse_arguments()
    sys.exit(run_tool("tune_kernels", lambda: main(options)))
