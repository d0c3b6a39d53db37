#!/usr/bin/env python3
"""Makes a topology for a dense checkpoint, so that it goes on as sparse training; or takes it away again.

One process, no devices, one tensor in memory at a time. Which units are active is decided as a run decides it:
densities of the schedule and the distribution, exact selection, the run's random numbers. A run's checkpoint keeps
its optimizer state, of active units; a model folder has none.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megasparse.checkpoint.reader import Checkpoint
from megasparse.checkpoint.saved_state import SavedState, moved, weight_bytes
from megasparse.checkpoint.weights import find_checkpoint
from megasparse.checkpoint.writing import write_checkpoint
from megasparse.config.loader import load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.conversion.folder_state import WeightsState, write_model_folder
from megasparse.conversion.sources import open_source
from megasparse.conversion.sparsify import METHODS, check_only_sparsity, densify, sparsify
from megasparse.data.arguments import progress_bar, run_tool, tool_parser
from megasparse.data.record import record_files
from megasparse.utils.folders import new_folder

EXAMPLES = """examples:
  # a dense run goes on at a tenth of the weights, the largest ones, with its moments
  python tools/sparsify.py --run runs/dense --density 0.1 --block-size 16 --output runs/sparse
  python launch/pretrain.py --config runs/sparse/config.yaml train.resume=auto

  # a converted model: single weights at random, Erdos-Renyi, the first block dense; then topologies evolve by RigL
  python tools/sparsify.py --model models/gpt2 --method random --density 0.2 --block-size 1 \\
      --distribution erdos_renyi --keep-dense 'layers.0.*' --algorithm rigl --output models/gpt2-sparse
  python launch/pretrain.py --config models/gpt2-sparse/config.yaml train.init_from=models/gpt2-sparse

  # back to dense training: zeros stay zeros until the optimizer moves them
  python tools/sparsify.py --densify --run runs/sparse --output runs/dense-again
"""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="FOLDER", help="folder of a run; the output is one too")
    source.add_argument("--model", type=Path, metavar="FOLDER", help="a model folder; the output is one too")
    parser.add_argument("--step", type=int, metavar="N", help="the run's checkpoint (default: the newest good one)")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new folder")
    parser.add_argument("--weights-only", action="store_true", help="of a run: make a model folder")
    parser.add_argument("--densify", action="store_true", help="the reverse: all units are active, no masks")
    parser.add_argument("--method", choices=METHODS, help="which units are active (default: magnitude)")
    parser.add_argument("--density", type=float, metavar="D", help="share of active weights (sparsity.density)")
    parser.add_argument("--block-size", type=int, metavar="N", help="of blocks; 1: weights (sparsity.block_size)")
    parser.add_argument("--distribution", choices=("uniform", "erdos_renyi"), help="of the density over the layers")
    parser.add_argument("--row-floor", action="store_true", help="an active block in every row of blocks")
    parser.add_argument("--algorithm", help="how training goes on (default: static, the topology stays)")
    parser.add_argument("--keep-dense", nargs="+", default=[], metavar="PATTERN", help="layers that stay dense")
    parser.add_argument("settings", nargs="*", metavar="sparsity.FIELD=VALUE", help="any other setting of the section")
    arguments = parser.parse_args()
    if arguments.densify and (arguments.method is not None or overrides(arguments)):
        parser.error("--densify: takes no setting of the topology")
    if not arguments.densify and arguments.density is None:
        parser.error("--density: missing; must be above 0, at most 1")
    return arguments


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The options as settings of section `sparsity`."""
    named = {name: getattr(arguments, name) for name in ("density", "block_size", "distribution", "algorithm")}
    words = [f"sparsity.{name}={value}" for name, value in named.items() if value is not None]
    if arguments.row_floor:
        words.append("sparsity.row_floor=true")
    if arguments.keep_dense:
        groups = ", ".join(f"{{pattern: {pattern!r}, dense: true}}" for pattern in arguments.keep_dense)
        words.append(f"sparsity.groups=[{groups}]")
    return words + arguments.settings


def main(arguments: argparse.Namespace) -> None:
    run, output = arguments.run, arguments.output
    config_file = (run or arguments.model) / "config.yaml"
    if run is not None and not arguments.weights_only:
        saved = Checkpoint(find_checkpoint(run, arguments.step)[0])
        saved.check_only_topology()
        changed, config = changed_state(arguments, saved, load_config([config_file]), config_file, saved.facts.step)
        with new_folder(output) as folder, progress_bar("writing", weight_bytes(saved)) as progress:
            save_config(moved(config, output), folder / "config.yaml")
            for name, path in record_files(run).items():
                shutil.copyfile(path, folder / name)
            write_checkpoint(changed, folder, progress)
        words = f"--config {output / 'config.yaml'} train.resume=auto"
    else:
        source = open_source(run or arguments.model, arguments.step)
        saved = WeightsState(source)
        changed, config = changed_state(arguments, saved, source.config, config_file, 0)
        with progress_bar("writing", weight_bytes(saved)) as progress:
            write_model_folder(changed, config, source.files, output, progress)
        words = f"--config {output / 'config.yaml'} train.init_from={output}"
    print(f"{output}: written; to train: python launch/pretrain.py {words}")


def changed_state(
    arguments: argparse.Namespace, saved: SavedState, config: RunConfig, config_file: Path, step: int
) -> tuple[SavedState, RunConfig]:
    """The state as it shall be, and its configuration."""
    if arguments.densify:
        return densify(saved, config)
    wanted = load_config([config_file], ["sparsity.algorithm=static", *overrides(arguments)])
    check_only_sparsity(load_config([config_file]), wanted)
    table = Table("layer", "density")
    config = config.model_copy(update={"sparsity": wanted.sparsity})
    masked = sparsify(
        saved,
        config,
        arguments.method or "magnitude",
        step,
        report=lambda layer, density: table.add_row(layer, f"{density:.4f}"),
    )
    Console().print(table)
    return masked, config


if __name__ == "__main__":
    options = parse_arguments()
    raise SystemExit(run_tool("sparsify", lambda: main(options)))
