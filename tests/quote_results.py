"""The tables that READMEs quote, of studies, decoding, pruning and models, made from the committed results.

    python tests/quote_results.py        # writes the tables anew, after results have changed

A table stands between `<!-- Results of benchmarks/results/NAME.json -->` and `<!-- End of the results -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from test_architecture import ROOT

from megasparse.studies.tables import arm_rows, difference_rows

PAGES = [ROOT / name for name in ("README.md", "configs/studies/README.md", "launch/README.md", "tools/README.md")]
QUOTED = re.compile(r"(<!-- Results of (benchmarks/results/\S+\.json) -->\n).*?(<!-- End of the results -->\n)", re.S)


def study_table(results: Mapping[str, Any]) -> str:
    """What each arm has reached, with its paired difference to each baseline, in Markdown: of the accuracy where there
    is a task, else of the loss."""
    of = "accuracy_differences" if results["accuracy_differences"] else "differences"
    minus = {(row["arm"], row["minus"]): row for row in difference_rows(results, of)}
    baselines = list(dict.fromkeys(baseline for _, baseline in minus))
    shown = ("arm", "shape", "tokens", "lr", "validation loss", *(["task accuracy"] if of != "differences" else []))
    rows = list[list[str]]()
    for arm, row in zip(results["arms"], arm_rows(results), strict=True):
        if arm["n"]:
            pairs = [paired(minus.get((row["arm"], baseline))) for baseline in baselines]
            rows.append([*(row[name] for name in shown), row["n"], *pairs])
    return markdown([*shown, "seeds", *(f"minus {baseline}" for baseline in baselines)], rows)


def decoding_table(results: Mapping[str, Any]) -> str:
    """What benchmarks/sparse_decoding.py has measured of each model: its layers' bytes, and how fast it is."""
    rows = []
    for row in results["results"]:
        stored = f"{row['megabytes']:.0f}" if "megabytes" in row else ""
        tokens = f"{1000 * results['batch'] / row['milliseconds_per_token']:.0f}"
        rows.append([row["name"], stored, tokens, f"{row['speedup']:.2f}", f"{row['prompt_milliseconds']:.0f}"])
    prompt = f"prompt of {results['prompt']}, ms"
    return markdown(["weights", "MB", "tokens a second", "over dense fp32", prompt], rows)


def pruning_table(results: Mapping[str, Any]) -> str:
    """What benchmarks/one_shot_pruning.py has found: perplexity by method and share of weights that are gone."""
    pruned = results["pruned"]
    gone = list(dict.fromkeys(row["sparsity"] for row in pruned))
    rows = [["none", *(f"{results['dense']['perplexity']:.2f}" for _ in gone)]]
    for kind in dict.fromkeys((row["method"], row["distribution"], row["sds"]) for row in pruned):
        found = {row["sparsity"]: row for row in pruned if (row["method"], row["distribution"], row["sds"]) == kind}
        method, distribution, sds = kind
        words = [method, *(["AlphaPruning"] if distribution == "alpha" else []), *(["SDS"] if sds else [])]
        rows.append([", ".join(words), *(f"{found[share]['perplexity']:.2f}" for share in gone)])
    return markdown(["pruned by", *(f"{share:.0%}" for share in gone)], rows)


def models_table(results: Mapping[str, Any]) -> str:
    """What benchmarks/accuracy_and_speed.py has measured of each model."""
    rows = []
    for model in results["models"]:
        found = f"{model['results']['accuracy']:.3f}", f"{model['tokens_per_second']:.0f}", f"{model['speedup']:.2f}"
        rows.append([model["name"], f"{model['megabytes']:.1f}", *found])
    return markdown(["model", "MB", "accuracy", "tokens a second", "over dense"], rows)


def paired(row: Mapping[str, str] | None) -> str:
    """A mean difference and its interval, which there is from two pairs on."""
    if row is None:
        return ""
    interval = next(value for name, value in row.items() if name.endswith("interval"))
    return row["difference"] + (f" ({interval})" if " to " in interval else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES = {"sparse": decoding_table, "one": pruning_table, "accuracy": models_table}
"""By the first word of the file's name; others are of studies."""


def with_tables(page: str) -> str:
    def quoted(found: re.Match[str]) -> str:
        results = json.loads((ROOT / found[2]).read_text(encoding="utf-8"))
        make = TABLES.get(Path(found[2]).name.partition("_")[0], study_table)
        return f"{found[1]}\n{make(results)}\n{found[3]}"

    return QUOTED.sub(quoted, page)


def write(path: Path) -> None:
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for path in PAGES:
        write(path)
