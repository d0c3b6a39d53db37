"""Several runs on one HTML page that loads nothing from elsewhere.

    write_comparison([Path("runs/mst"), Path("runs/dense")], Path("compare.html"))

Any run folders will do: of different lengths, still going on, killed, or without some of their files; what a run lacks
is said on the page. ``tools/report.py`` is the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.reporting.comparison_figures import comparison_figures
from megasparse.reporting.comparison_tables import COSTS, ComparedRun, budget_rows, ledger_groups, setting_rows
from megasparse.reporting.page import fill_in, film_strips, verdict
from megasparse.reporting.run_data import RunData, read_run
from megasparse.utils.files import write_at_once

MAX_RUNS = 16
"""Eight colours, each as a full and as a dashed line."""

FILMS_OF_A_RUN = 2
FILES_OF_A_RUN = ("config.yaml", "plan.json", "metrics.jsonl", "topology.jsonl", "summary.json")


def write_comparison(folders: Sequence[Path], output: Path) -> Path:
    """Write the page and return its path. Raises ConfigError for folders that hold no run, or a bad `output`."""
    if output.suffix not in (".html", ".htm"):
        raise ConfigError(f"--output: {output}; must be a file whose name ends in .html")
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"--output: {output}; must be a file in a folder that exists")
    write_at_once(output, render_comparison(read_runs(folders)))
    return output


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Read all folders and tell the runs apart: runs of the same name carry their folder as well."""
    if not 1 <= len(folders) <= MAX_RUNS:
        raise ConfigError(f"RUN: {len(folders)} run folders; must be 1 to {MAX_RUNS}")
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if resolved[number] in resolved[:number]:
            raise ConfigError(f"RUN: {folder} is given twice; must be different run folders")
        if folder.is_dir() and not any((folder / name).is_file() for name in FILES_OF_A_RUN):
            raise ConfigError(f"RUN: {folder} holds no run; must be a folder with {', '.join(FILES_OF_A_RUN)}")
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [
        ComparedRun(
            data=run,
            label=run.name if names.count(run.name) == 1 else f"{run.name} ({folder})",
            role=f"run_{number % 8 + 1}",
            mark="line" if number < 8 else "dashed",
        )
        for number, (run, folder) in enumerate(zip(runs, folders, strict=True))
    ]


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    return fill_in(
        "comparison.html",
        title=", ".join(run.label for run in runs),
        runs=[{**vars(run), "verdict": verdict(run.data)} for run in runs],
        budgets=budget_rows(runs),
        ledger=ledger_groups(runs),
        settings=setting_rows(runs),
        costs=COSTS,
        figures=comparison_figures(runs),
        films=[{"label": run.label, "role": run.role, **_films(run.data)} for run in runs],
    )


def _films(run: RunData) -> dict[str, Any]:
    """The first layers' pictures, and what was left out."""
    strips, remark = film_strips(replace(run, films=run.films[:FILMS_OF_A_RUN]))
    left_out = len(run.films) - FILMS_OF_A_RUN
    words = f"Further layers ({left_out}) are in the report of this run." if left_out > 0 else ""
    return {"strips": strips, "remark": f"{remark} {words}".strip()}
