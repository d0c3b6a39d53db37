#!/usr/bin/env python3
"""Packs a checkpoint without the values of inactive units, and unpacks it again, bit for bit.

One process, no devices, one tensor in memory at a time. The format: megasparse/checkpoint/compact/README.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megasparse.checkpoint.compact.encoding import FORMS
from megasparse.checkpoint.compact.manifest import CompactManifest, ParameterSize, size_report
from megasparse.checkpoint.compact.reader import CompactReader, unpack_run
from megasparse.checkpoint.compact.writer import pack
from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.saved_state import weight_bytes
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.config.loader import load_config
from megasparse.conversion.folder_state import WeightsState, write_model_folder
from megasparse.conversion.sources import open_source
from megasparse.data.arguments import progress_bar, run_tool, tool_parser
from megasparse.data.record import record_files

EXAMPLES = """examples:
  # the newest good checkpoint with moments, per-weight steps and position: the run can go on from it
  python tools/compact_checkpoint.py pack --run runs/quickstart-mst --output small

  # elsewhere: a run folder, and the run goes on
  python tools/compact_checkpoint.py unpack --input small --output runs/again
  python launch/pretrain.py --config runs/again/config.yaml train.resume=auto

  # weights and masks alone; unpacked, they are a model folder
  python tools/compact_checkpoint.py pack --run runs/quickstart-mst --step 400 --weights-only --output small
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="write a compact folder")
    source = packing.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run")
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder")
    packing.add_argument("--step", type=int, metavar="N", help="the run's checkpoint (default: the newest good one)")
    packing.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    packing.add_argument("--weights-only", action="store_true", help="weights and masks, nothing that a run goes on by")
    packing.add_argument("--index", choices=FORMS, help="form of the masks (default: the smaller, by layer)")
    unpacking = commands.add_parser("unpack", help="make a run folder, or a model folder where there are weights only")
    unpacking.add_argument("--input", required=True, type=Path, metavar="FOLDER", help="compact folder")
    unpacking.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    return parser.parse_args()


def main_pack(arguments: argparse.Namespace) -> None:
    weights_only = arguments.weights_only or arguments.model is not None
    if weights_only:
        source = open_source(arguments.run or arguments.model, arguments.step)
        saved, config, companions = WeightsState(source), source.config, source.files
    else:
        checkpoint, _ = find_checkpoint(arguments.run, arguments.step)
        saved, config = Checkpoint(checkpoint), load_config([arguments.run / "config.yaml"])
        saved.check_only_topology()
        companions = record_files(arguments.run)
    with progress_bar("packing", weight_bytes(saved)) as progress:
        more = {"weights_only": weights_only, "form": arguments.index, "companions": companions, "progress": progress}
        manifest = pack(saved, config, arguments.output, **more)
    print_sizes(manifest)
    print(f"{arguments.output}: written")


def main_unpack(arguments: argparse.Namespace) -> None:
    saved = CompactReader(arguments.input)
    with progress_bar("unpacking", weight_bytes(saved)) as progress:
        if saved.manifest.weights_only:
            saved.check_files()
            write_model_folder(saved, saved.config, saved.companions, arguments.output, progress)
            print(f"{arguments.output}: a model folder; a run starts from it with train.init_from={arguments.output}")
            return
        checkpoint = unpack_run(saved, arguments.output, progress)
    command = f"launch/pretrain.py --config {arguments.output / 'config.yaml'} train.resume=auto"
    print(f"{checkpoint}: written; to go on: python {command}")


def print_sizes(manifest: CompactManifest) -> None:
    """A table by density: what is dense, then the sparse parameters, then all."""
    table = Table("parameters", "density", "dense", "compact", "expected", "factor")
    for label, rows in _groups(size_report(manifest)):
        dense, compact, expected = (
            sum(getattr(row, name) for row in rows) for name in ("dense", "compact", "expected")
        )
        density = sum(row.density * row.dense for row in rows) / max(dense, 1)
        numbers = (f"{dense:,}", f"{compact:,}", f"{expected:,}", f"{dense / compact:.2f}")
        table.add_row(label, f"{density:.4f}", *numbers)
    Console().print(table)


def _groups(report: Sequence[ParameterSize]) -> Iterator[tuple[str, list[ParameterSize]]]:
    dense = [row for row in report if row.density == 1.0]
    if dense and len(dense) < len(report):
        yield f"{len(dense)} dense", dense
    yield from ((row.name, [row]) for row in report if row.density < 1.0)
    yield f"all {len(report)}", list(report)


if __name__ == "__main__":
    options = parse_arguments()
    chosen = {"pack": main_pack, "unpack": main_unpack}[options.command]
    raise SystemExit(run_tool("compact_checkpoint", lambda: chosen(options)))
