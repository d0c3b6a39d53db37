#!/usr/bin/env python3
"""Prunes a model folder: magnitude, Wanda or SparseGPT, block by block, in the memory of about one block.

The result is a model folder with exact zeros and a topology. What is done lies in `.OUTPUT.pruning` beside the output
until the end: the same command goes on after a kill. Ranks share the work and give the same result, however many they
are. Exit status: 0, 2 for what the user must mend, 3 where another rank was lost.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.data.arguments import tool_parser
from megasparse.launching import LaunchEnvironment, leave_warnings_to_rank_0
from megasparse.launching.exit import EXPECTED, explain_and_exit
from megasparse.launching.failures import exit_after_lost_peer, exit_now
from megasparse.utils.streams import use_utf8

EXAMPLES = """examples:
  # half of the weights go by SparseGPT, which changes the others to make up for it
  python tools/prune.py --model models/gpt2 --density 0.5 --calibration data/train.txt --output models/gpt2-50

  # 2 of every 4 weights of a row stay, by Wanda; 128 windows of 1,024 tokens of a token file
  python tools/prune.py --model models/gpt2 --method wanda --pattern 2:4 --calibration data/web --samples 128 \\
      --window 1024 --output models/gpt2-24

  # blocks of 16 x 16; blocks of layers that have learned less lose more (AlphaPruning); a layer stays dense
  python tools/prune.py --model models/gpt2 --density 0.3 --pattern 16x16 --distribution alpha \\
      --keep-dense layers.0.attention.qkv --calibration data/train.txt --output models/gpt2-30

  # further: the mask that the model has is extended
  python tools/prune.py --model models/gpt2-50 --density 0.25 --calibration data/train.txt --output models/gpt2-25

  # what came of it
  python launch/evaluate.py --run models/gpt2-50 --task perplexity --input data/test.txt
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a model folder")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--method", choices=("magnitude", "wanda", "sparsegpt"), default="sparsegpt", help="default: sparsegpt"
    )
    parser.add_argument("--density", type=float, metavar="D", help="share of weights that stay, over all pruned layers")
    pattern = "unstructured (default), n:m such as 2:4 or 16:32 (n of m stay), bxb such as 16x16"
    parser.add_argument("--pattern", default="unstructured", metavar="P", help=pattern)
    distribution = "uniform (default), or alpha: AlphaPruning, by the spectra of the weights"
    parser.add_argument("--distribution", choices=("uniform", "alpha"), default="uniform", help=distribution)
    spread = "of alpha: sparsities of blocks differ by up to this share of their mean, either way (default: 0.3)"
    parser.add_argument("--spread", type=float, metavar="E", help=spread)
    parser.add_argument("--keep-dense", nargs="+", default=[], metavar="PATTERN", help="layers that stay as they are")
    zeros = "weights that are 0 in a model without a topology stay 0"
    parser.add_argument("--keep-zeros", action="store_true", help=zeros)
    calibration = parser.add_argument_group("calibration (wanda, sparsegpt, --sds)")
    calibration.add_argument("--calibration", metavar="FILE", help="text, or prefix of an indexed data set")
    calibration.add_argument("--samples", type=int, metavar="N", help="windows of it (default: 128)")
    window = "tokens of a window (default: the model's seq_length, at most 2048)"
    calibration.add_argument("--window", type=int, metavar="N", help=window)
    calibration.add_argument("--seed", type=int, metavar="N", help="of the choice of windows (default: 0)")
    damping = "of SparseGPT: share of the mean diagonal that is added to the Hessian (default: 0.01)"
    calibration.add_argument("--damping", type=float, metavar="X", help=damping)
    columns = "of SparseGPT: columns whose weights are chosen together (default: 128)"
    calibration.add_argument("--columns", type=int, metavar="N", help=columns)
    sds = "prune, let the removed weights come back, prune again (any method; needs --calibration)"
    parser.add_argument("--sds", action="store_true", help=sds)
    penalty = "of --sds: price of removed weights that come back (default: 1)"
    parser.add_argument("--sds-penalty", type=float, metavar="X", help=penalty)
    restart = "begin anew where an unfinished pruning of other settings is there"
    parser.add_argument("--restart", action="store_true", help=restart)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args()
    del arguments.local_rank
    return arguments


def main() -> int:
    use_utf8()
    arguments = vars(parse_arguments())
    os.environ["DS_ACCELERATOR"] = arguments["device"]
    from megasparse.pruning.patterns import parse_pattern
    from megasparse.pruning.run import prune
    from megasparse.pruning.settings import PruneSettings

    rank = 0
    try:
        environment = LaunchEnvironment.from_variables(os.environ)
        rank = environment.rank
        leave_warnings_to_rank_0(rank)
        arguments["pattern"] = parse_pattern(arguments["pattern"])
        arguments["keep_dense"] = tuple(arguments["keep_dense"])
        with exit_after_lost_peer(rank, "start the pruning again: it goes on where it was"):
            prune(PruneSettings(**arguments), environment)
            if environment.world_size > 1:
                exit_now(0)
    except EXPECTED as error:
        explain_and_exit(error, rank)
    return 0


if __name__ == "__main__":
    sys.exit(main())
