#!/usr/bin/env python3
"""Writes a teacher's hidden states for a run that learns from it: the run then reads them, without a teacher in memory.

Takes the run's configuration and covers the samples that the run will read. A token takes hidden size x states x 2
bytes (bfloat16); states are those that SquareHead compares: the output of each block, or the teacher's of layer_map.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from megasparse.config.loader import load_config
from megasparse.data.arguments import progress_bar, run_tool, tool_parser

EXAMPLES = """examples:
  python launch/finetune.py --model models/half --teacher models/dense --data data/tasks --print-config > run.yaml
  python tools/teacher_states.py --config run.yaml --output states
  deepspeed launch/pretrain.py --config run.yaml distillation.states=states
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; may be repeated")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings that win over the files")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    return parser.parse_intermixed_args()


def main(arguments: argparse.Namespace) -> None:
    os.environ["DS_ACCELERATOR"] = arguments.device
    from megasparse.objectives.write_states import write_states

    config = load_config(arguments.config, arguments.overrides)
    with progress_bar("writing", 1) as progress:
        found = write_states(
            config,
            arguments.output,
            dtype=arguments.dtype,
            device=arguments.device,
            progress=lambda done, total: progress(done / total),
        )
    samples, states, tokens, width = found.shape
    size = (arguments.output / "states.bin").stat().st_size
    print(f"{arguments.output}: {samples:,} samples of {tokens:,} tokens, states {', '.join(found.states)}")
    print(f"{size:,} bytes: {size // (samples * tokens):,} a token ({states} x {width} of {found.dtype})")


if __name__ == "__main__":
    options = parse_arguments()
    sys.exit(run_tool("teacher_states", lambda: main(options)))
