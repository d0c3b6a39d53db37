#!/usr/bin/env python3
"""Quantises a model folder: weights of 8 bits for int8 products, or of 3 and 4 bits; block by block, without training.

The result is a model folder that opens everywhere. Zeros stay exactly 0, so that a sparse model keeps its masks;
embeddings, norms and the head stay as they are. Exit status: 0, or 2 for what the user must mend.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.data.arguments import run_tool, tool_parser

EXAMPLES = """examples:
  # int8 weights; activations become int8 while the model runs, token by token
  python tools/quantize.py --model models/gpt2-50 --output models/gpt2-50-int8

  # with SmoothQuant, whose scales come from 128 windows of a text; errors of the blocks are shown
  python tools/quantize.py --model models/gpt2-50 --smoothing 0.5 --calibration data/train.txt \\
      --output models/gpt2-50-smooth

  # 4 bits in groups of 32 inputs, rounded by what the model's predictions say (DiscQuant)
  python tools/quantize.py --model models/gpt2-50 --bits 4 --rounding discquant --calibration data/train.txt \\
      --output models/gpt2-50-int4

  # what came of it
  python launch/evaluate.py --run models/gpt2-50-int8 --task perplexity --input data/test.txt
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a model folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument("--bits", type=int, choices=(3, 4, 8), default=8, help="of a weight (default: 8)")
    group = "neighbouring inputs that share a scale (default: 32 at 3 and 4 bits, all inputs of an output at 8)"
    parser.add_argument("--group", type=int, metavar="N", help=group)
    activations = "of quantised layers: int8 (default at 8 bits), each token by its largest value; float (otherwise)"
    parser.add_argument("--activations", choices=("int8", "float"), help=activations)
    smoothing = "SmoothQuant with this exponent, such as 0.5: large inputs behind norms move into the weights"
    parser.add_argument("--smoothing", type=float, metavar="A", help=smoothing)
    rounding = "nearest (default); discquant: learned, needs memory for the whole model five times"
    parser.add_argument("--rounding", choices=("nearest", "discquant"), default="nearest", help=rounding)
    parser.add_argument("--keep-float", nargs="+", default=[], metavar="PATTERN", help="layers that stay as they are")
    calibration = parser.add_argument_group("calibration (for smoothing, discquant, and to see errors)")
    calibration.add_argument("--calibration", metavar="FILE", help="text, or prefix of an indexed data set")
    calibration.add_argument("--samples", type=int, metavar="N", help="windows of it (default: 128)")
    window = "tokens of a window (default: the model's seq_length, at most 2048)"
    calibration.add_argument("--window", type=int, metavar="N", help=window)
    calibration.add_argument("--seed", type=int, metavar="N", help="of the choice of windows (default: 0)")
    learned = parser.add_argument_group("discquant")
    learned.add_argument("--steps", type=int, metavar="N", help="default: 1024")
    learned.add_argument("--batch", type=int, metavar="N", help="windows a step (default: 8)")
    learned.add_argument("--lr", type=float, metavar="X", help="learning rate (default: 0.1)")
    strength = "of the divergence of predictions against the distance of weights (default: 200)"
    learned.add_argument("--strength", type=float, metavar="X", help=strength)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    os.environ["DS_ACCELERATOR"] = arguments.device
    from megasparse.monitoring.console import make_console
    from megasparse.quantization.run import quantize
    from megasparse.quantization.settings import QuantizeSettings

    values = {**vars(arguments), "keep_float": tuple(arguments.keep_float)}
    quantize(QuantizeSettings(**values), make_console())


if __name__ == "__main__":
    options = parse_arguments()
    sys.exit(run_tool("quantize", lambda: main(options)))
