#!/usr/bin/env python3
"""Makes a deeper or a wider model of a model.

--layers: layer j of the result is a copy of layer j mod n of a model of n layers, weights and masks as they are
(G_stack, Du et al. 2024, arXiv 2405.15319); embeddings, last norm and head stay. Blocks add to what comes in, so the
result does not compute what the model did: its loss is higher until it has been trained on. A run does the same on its
way with section `stacking` of its configuration.

--hidden-size: new channels, heads and units in proportion, with zeros so placed that the result computes what the model
did. For dense models with rmsnorm.

One process, no devices, one tensor in memory at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megasparse.checkpoint.saved_state import weight_bytes
from megasparse.conversion.folder_state import WeightsState, write_model_folder
from megasparse.conversion.sources import open_source
from megasparse.conversion.stacking import stack_layers
from megasparse.conversion.widening import widen
from megasparse.data.arguments import positive, progress_bar, run_tool, tool_parser

EXAMPLES = """examples:
  python tools/grow_model.py --model models/small --layers 8 --output models/deep
  python tools/grow_model.py --model models/small --hidden-size 128 --output models/wide
  python launch/pretrain.py --config my.yaml model.num_layers=8 train.init_from=models/deep
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a model folder, or that of a run")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--layers", type=positive, metavar="N", help="a multiple of the model's")
    size.add_argument("--hidden-size", type=positive, metavar="N", help="larger than the model's")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new model folder")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    source, output = open_source(arguments.model), arguments.output
    small, saved = source.config.model, WeightsState(source)
    if arguments.layers is not None:
        grown, config = stack_layers(saved, source.config, arguments.layers)
        done = f"{small.num_layers} layers are copied to {arguments.layers}"
        loss = f"Its loss is higher than that of {arguments.model} at first."
    else:
        grown, config = widen(saved, source.config, arguments.hidden_size)
        done = f"{small.hidden_size} channels have become {arguments.hidden_size}"
        loss = f"It computes what {arguments.model} does."
    with progress_bar("writing", weight_bytes(grown)) as progress:
        write_model_folder(grown, config, source.files, output, progress)
    print(f"{output}: written; {done}")
    print(f"{loss} To train it:")
    print(f"python launch/pretrain.py --config {output / 'config.yaml'} train.init_from={output}")


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("grow_model", lambda: main(options)))
