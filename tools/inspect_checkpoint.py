#!/usr/bin/env python3
"""Shows what is in a checkpoint, how two differ, or what of one is damaged. Nothing is executed from any file.

Takes run folders, checkpoints in them, compact folders, model folders and Hugging Face folders. Ends
with 0; --verify with 1 where something is damaged; 2 where the folder is none of these or cannot be opened.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megasparse.conversion.inspection.description import Description, describe
from megasparse.conversion.inspection.difference import Difference, compare
from megasparse.conversion.inspection.opening import open_any
from megasparse.conversion.inspection.verification import Problem, verify
from megasparse.data.arguments import run_tool, tool_parser

EXAMPLES = """examples:
  python tools/inspect_checkpoint.py runs/quickstart-mst
  python tools/inspect_checkpoint.py --values models/gpt2            # reads all: zeros, largest, not finite
  python tools/inspect_checkpoint.py --diff runs/a runs/b
  python tools/inspect_checkpoint.py --verify runs/quickstart-mst    # every checkpoint of the run
  python tools/inspect_checkpoint.py --json small | jq .density
"""

MOST_NAMES = 8
"""Of tensors that only one of two folders has; JSON has them all."""


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__, EXAMPLES)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="one, or two with --diff")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--diff", action="store_true", help="how two folders differ")
    what.add_argument("--verify", action="store_true", help="check files, checksums and zeros of inactive units")
    parser.add_argument("--step", type=int, metavar="N", help="of a run: its checkpoint (default: the newest good one)")
    parser.add_argument("--values", action="store_true", help="also read all tensors and tell what their numbers are")
    parser.add_argument("--json", action="store_true", help="JSON in place of tables")
    arguments = parser.parse_args()
    if len(arguments.folders) != (2 if arguments.diff else 1):
        parser.error("FOLDER: number of folders must be two with --diff, otherwise one")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    if arguments.verify:
        problems = verify(arguments.folders[0])
        print_json([asdict(problem) for problem in problems]) if arguments.json else print_problems(problems)
        sys.exit(1 if problems else 0)
    opened = [open_any(folder, arguments.step) for folder in arguments.folders]
    if arguments.diff:
        difference = compare(*opened)
        if arguments.json:
            print_json({"equal": difference.equal, **asdict(difference)})
        else:
            print_difference(difference, Console())
    else:
        description = describe(opened[0], read_values=arguments.values)
        print_json(asdict(description)) if arguments.json else print_description(description, Console())


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=1))


def print_problems(problems: Sequence[Problem]) -> None:
    for problem in problems:
        print(f"{problem.file}: {problem.reason}")
    print(f"{len(problems)} problems" if problems else "all is well")


def print_description(description: Description, console: Console) -> None:
    print(f"{description.kind} {description.folder}")
    facts = Table(show_header=False)
    for label in ("step", "optimizer_steps", "tokens", "algorithm"):
        facts.add_row(label.replace("_", " "), str(getattr(description, label)))
    facts.add_row("parameters", f"{description.parameters:,}, active {description.active_parameters:,}")
    facts.add_row("density", f"{description.density:.4f} of the sparse matrices")
    facts.add_row("moments", ", ".join(description.moments) or "none")
    facts.add_row("layout", ", ".join(f"{name} {value}" for name, value in description.layout.items()) or "whole")
    console.print(facts)
    with_values = any(row.values for row in description.tensors)
    more = ["zeros", "largest", "not finite"] if with_values else []
    table = Table("tensor", "shape", "block_size", "active", "density", *more)
    for row in description.tensors:
        shape = " x ".join(map(str, row.shape))
        cells = [row.name, shape, str(row.block_size or ""), _number(row.active), _share(row.density)]
        if row.values is not None:
            cells += [_share(row.values.zeros), f"{row.values.largest:.4g}", _number(row.values.not_finite)]
        table.add_row(*cells)
    console.print(table)
    files = Table("file", "bytes", "SHA-256")
    for name, (size, checksum) in description.files.items():
        files.add_row(name, f"{size:,}", checksum[:16])
    console.print(files)
    for note in description.notes:
        print(note)


def print_difference(difference: Difference, console: Console) -> None:
    progress = [f"{label}: {a} -> {b}" for label, (a, b) in difference.progress.items()]
    for line in (*difference.settings, *progress):
        print(line)
    for label, names in (("first", difference.only_first), ("second", difference.only_second)):
        rest = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        for name in (*names[:MOST_NAMES], *rest):
            print(f"only in the {label}: {name}")
    if difference.layers:
        table = Table("sparse layer", "active in both", "only in the first", "only in the second", "units")
        for layer in difference.layers:
            counts = (layer.both, layer.only_first, layer.only_second)
            table.add_row(layer.layer, *(f"{count:,}" for count in counts), layer.block_size)
        console.print(table)
    if difference.tensors:
        table = Table("tensor", "kind", "largest difference", "relative", "entries", "")
        for row in difference.tensors:
            cells = (f"{row.largest:.4g}", f"{row.relative:.4g}", f"{row.entries:,}", row.note)
            table.add_row(row.name, row.kind, *cells)
        console.print(table)
    print(f"{difference.compared} tensors in both, {len(difference.tensors)} of them differ")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    options = parse_arguments()
    sys.exit(run_tool("inspect_checkpoint", lambda: main(options)))
