#!/usr/bin/env python3
"""Writes the universal form of a run's checkpoint, from which the run goes on in any layout.

One process, no devices. The checkpoint itself stays as it is; the universal form lies in its folder, in `universal/`.
"""

from __future__ import annotations

import argparse
from math import prod
from pathlib import Path

from megasparse.checkpoint.layout import read_layout
from megasparse.checkpoint.universal import UNIVERSAL, UniversalReader, verify_universal, write_universal
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.data.arguments import progress_bar, run_tool, tool_parser

EXAMPLES = """examples:
  # from the newest good checkpoint
  python tools/universal_checkpoint.py --run runs/quickstart-mst

  # from that of step 400, and compare every tensor with it afterwards
  python tools/universal_checkpoint.py --run runs/quickstart-mst --step 400 --verify

  # then go on, here on one process in place of two
  python launch/pretrain.py --config configs/quickstart.yaml train.resume=auto train.universal=true
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--step", type=int, metavar="N", help="its checkpoint of step N (default: the newest good one)")
    parser.add_argument(
        "--verify", action="store_true", help="then check all checksums, and every tensor against the checkpoint"
    )
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    folder, manifest = find_checkpoint(arguments.run, arguments.step)
    if manifest.is_universal_only:
        check_only_form(folder, arguments.verify)
        return
    weights = 4 * sum(prod(partition.shape) for partition in read_layout(folder).parameters.values())
    with progress_bar("writing", weights) as progress:
        written = write_universal(folder, progress)
    print(f"{folder / UNIVERSAL}: {'written' if written else 'there already'}")
    if arguments.verify:
        with progress_bar("verifying", weights) as progress:
            verify_universal(folder, progress)
        print(f"{folder / UNIVERSAL}: every tensor equals the checkpoint's")


def check_only_form(folder: Path, verify: bool) -> None:
    """Of a checkpoint that another tool has made there are no other files to compare with."""
    universal = UniversalReader(folder)
    print(f"{folder / UNIVERSAL}: there already, and all that there is")
    if verify:
        universal.check_files()
        print(f"{folder / UNIVERSAL}: every file has its checksum")


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("universal_checkpoint", lambda: main(options)))
