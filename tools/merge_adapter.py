#!/usr/bin/env python3
"""Puts an adapter into the model that it was trained on (Sparse Matrix Tuning, SpIEL): a model folder like any other.

A run with section `smt` or `spiel` leaves adapter.safetensors in its folder: which entries were trained, and what is
added to them. Each sum is rounded once, to the dtype of the model; all other weights stay as they are, bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megasparse.checkpoint.saved_state import weight_bytes
from megasparse.conversion.adapters import merge_adapter
from megasparse.conversion.folder_state import WeightsState
from megasparse.conversion.sources import open_source
from megasparse.data.arguments import progress_bar, run_tool, tool_parser

EXAMPLES = """examples:
  python tools/merge_adapter.py --model models/gpt2 --adapter runs/tuned/adapter.safetensors --output models/tuned
  python tools/convert_checkpoint.py to-huggingface --input models/tuned --output exported
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="train.init_from of the run")
    parser.add_argument("--adapter", required=True, type=Path, metavar="FILE", help="adapter.safetensors of the run")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new model folder")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    with progress_bar("writing", weight_bytes(WeightsState(open_source(arguments.model)))) as progress:
        adaptation = merge_adapter(arguments.model, arguments.adapter, arguments.output, progress)
    count = sum(values.numel() for values in adaptation.values.values())
    print(f"{arguments.output}: written; {count:,} entries of {len(adaptation.values)} matrices from the adapter")


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("merge_adapter", lambda: main(options)))
