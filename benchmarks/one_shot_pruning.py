#!/usr/bin/env python3
"""Perplexity of a model pruned in one shot: each method, with uniform and AlphaPruning densities, alone and within SDS.

    python benchmarks/one_shot_pruning.py --model models/books --calibration data/books/train --text data/books/test.txt

Every pruning starts from the given model folder, a trained one, and is written to a folder that goes when it has been
measured, unless --keep says where it stays; what is in that place already is measured and not made again. Perplexity is
that of launch/evaluate.py with windows of the model's length and half of it between them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from result_file import RESULTS, write_result

from megasparse.evaluation.inputs import is_token_file
from megasparse.evaluation.run import EvaluationSettings, evaluate
from megasparse.launching import LaunchEnvironment
from megasparse.pruning.run import prune
from megasparse.pruning.settings import DISTRIBUTIONS, METHOD_NAMES, PruneSettings

ALONE = LaunchEnvironment.from_variables({})


@dataclass(frozen=True)
class Case:
    """One pruning."""

    sparsity: float
    method: str
    distribution: str
    sds: bool

    @property
    def name(self) -> str:
        return f"{self.method}-{self.distribution}{'-sds' if self.sds else ''}-{100 * self.sparsity:g}"


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    for sparsity in arguments.sparsities:
        for method in arguments.methods:
            for distribution in arguments.distributions:
                yield from (Case(sparsity, method, distribution, sds) for sds in (False, True)[: 2 - arguments.no_sds])


def measure(case: Case, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prune where it has not been done, and evaluate."""
    output = folder / case.name
    needs_data = case.sds or case.method != "magnitude"
    if not output.exists():
        settings = PruneSettings(
            arguments.model,
            output,
            method=case.method,
            density=round(1.0 - case.sparsity, 9),
            distribution=case.distribution,
            sds=case.sds,
            calibration=arguments.calibration if needs_data else None,
            samples=arguments.samples if needs_data else None,
        )
        prune(settings, ALONE)
    return {**vars(case), **perplexity(output, arguments)}


def perplexity(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        asked = EvaluationSettings(
            model, "perplexity", arguments.text, limit=arguments.limit, output=Path(name) / "found.json"
        )
        results = evaluate(asked, ALONE)["results"]
    return {key: results[key] for key in ("perplexity", "loss", "tokens_scored")}


def table(dense: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [f"dense: perplexity {dense['perplexity']:.4f}", "sparsity  method      densities  sds    perplexity"]
    for row in rows:
        value = math.inf if row["perplexity"] is None else row["perplexity"]
        sds = "yes" if row["sds"] else "no"
        lines.append(f"{row['sparsity']:<9g} {row['method']:<11} {row['distribution']:<10} {sds:<6} {value:.4f}")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="FOLDER", help="a trained, dense model folder")
    calibration = "text or token file that pruning looks at; no part of --text"
    parser.add_argument("--calibration", required=True, metavar="FILE", help=calibration)
    parser.add_argument("--text", required=True, metavar="FILE", help="text or token file that is evaluated")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8], metavar="S")
    parser.add_argument("--methods", nargs="+", default=list(METHOD_NAMES), choices=METHOD_NAMES)
    parser.add_argument("--distributions", nargs="+", default=list(DISTRIBUTIONS), choices=DISTRIBUTIONS)
    parser.add_argument("--no-sds", action="store_true", help="leave out the prunings within SDS")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (default: 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N windows only")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the pruned models there")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    dense, rows = perplexity(arguments.model, arguments), []
    with tempfile.TemporaryDirectory() as name:
        rows = [measure(case, arguments, arguments.keep or Path(name)) for case in cases(arguments)]
    print(table(dense, rows))
    facts = json.loads((arguments.model / "checksums.json").read_text(encoding="utf-8"))
    numbers = {
        "model": {"folder": arguments.model.name, "files": facts},
        "text": Path(arguments.text).name,
        "is_token_file": is_token_file(arguments.text),
        "limit": arguments.limit,
        "samples": arguments.samples,
        "dense": dense,
        "pruned": rows,
    }
    print(write_result("one_shot_pruning", numbers, suffix=arguments.model.name, folder=arguments.results))


if __name__ == "__main__":
    main()
