"""What a study has found, as plain numbers: ``results.json``, from which table and page are made.

    results = collect(study, arms, budget, sweep, jobs, failures, digest_of)
    write_results(results, folder / "results.json")
    known = read_known([Path("results.json")])           # so that another study need not run again what this one has

Curves are those of validation, rounded to five digits, a list for each column: small enough to be committed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megasparse.config.loader import ConfigError
from megasparse.reporting.run_data import RunData, column, read_run
from megasparse.studies.format import Study
from megasparse.studies.jobs import Job
from megasparse.studies.solving import SolvedArm
from megasparse.studies.statistics import CONFIDENCE, paired, spread
from megasparse.utils.files import describe_failure, write_at_once
from megasparse.utils.format import finite

COSTS = ("step", "tokens", "flops_algorithmic", "seconds")
DIGITS = 5
NOT_FINITE = "its validation loss is not finite, so that it is in no mean"


def collect(
    study: Study,
    arms: Sequence[SolvedArm],
    budget: float,
    sweep: Sequence[Job],
    jobs: Sequence[Job],
    failures: Mapping[str, str],
    digest_of: Callable[[Job], str],
) -> dict[str, Any]:
    """sweep: the runs with which learning rates were chosen; jobs: those that are compared."""
    rows = [_arm(arm, sweep, [job for job in jobs if job.arm == arm.name], digest_of) for arm in arms]
    finished = next((job.summary() for job in jobs if job.finished), {})
    return {
        "study": study.name,
        "budget_flops": budget,
        "seeds": study.seeds,
        "hardware": finished.get("hardware"),
        "versions": finished.get("versions"),
        "confidence": CONFIDENCE,
        "arms": rows,
        "differences": _differences(study, rows, "val_loss"),
        "accuracy_differences": _differences(study, rows, "task_accuracy"),
        "failures": {**failures, **{job.name: NOT_FINITE for job in jobs if job.finished and job.val_loss is None}},
    }


def read_known(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The runs in files of results by their digests. Raises ConfigError for a file that is none."""
    known: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
            runs = [run for arm in arms for run in (*arm["sweep"], *arm["runs"])]
            known |= {run["digest"]: run for run in runs if finite(run["val_loss"]) is not None}
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = describe_failure(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            raise ConfigError(f"--known: {path}: {reason}; must be a results.json of a study") from None
    return known


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """As JSON with each list of numbers on one line."""
    lists = re.compile(r"\[[\d\s.,e+-]+\]")
    text = lists.sub(lambda numbers: " ".join(numbers[0].split()), json.dumps(results, indent=1))
    write_at_once(path, text + "\n")


def _arm(arm: SolvedArm, sweep: Sequence[Job], jobs: Sequence[Job], digest_of: Callable[[Job], str]) -> dict[str, Any]:
    runs = [_run(job, digest_of) for job in jobs if job.val_loss is not None]
    losses = [run["val_loss"] for run in runs]
    return {
        "arm": arm.name,
        "solve": arm.solve,
        "lr": jobs[0].rate if jobs else None,
        "sweep": [_run(job, digest_of) for job in sweep if job.arm == arm.name and job.finished],
        "steps": arm.config.train.steps,
        "hidden_size": arm.config.model.hidden_size,
        "num_layers": arm.config.model.num_layers,
        "tokens": arm.tokens,
        "parameters": arm.plan["parameters"]["total"],
        "mean_active_parameters": arm.mean_active,
        "mean_density": arm.plan["schedule"]["mean_density"],
        "flops": arm.flops,
        "flops_dense": arm.plan["flops"]["dense"],
        "n": len(losses),
        "mean": fmean(losses) if losses else None,
        **_accuracies([run.get("task_accuracy") for run in runs]),
        "spread": spread(losses),
        "seconds": fmean(run["seconds"] for run in runs) if runs else None,
        "runs": runs,
    }


def _run(job: Job, digest_of: Callable[[Job], str]) -> dict[str, Any]:
    """Of one that has finished; the loss is None where it is not finite."""
    if job.known is not None:
        return dict(job.known)
    summary = job.summary()
    return {
        "digest": digest_of(job),
        "seed": job.seed,
        "lr": job.rate,
        "val_loss": job.val_loss,
        **({"task_accuracy": summary["task_accuracy"]} if "task_accuracy" in summary else {}),
        "flops": summary["flops_algorithmic"],
        "seconds": summary["seconds"],
        "hardware": summary["hardware"],
        "curve": _curve(read_run(job.folder)),
    }


def _curve(run: RunData) -> dict[str, list[float]]:
    """Each cost at each validation, and its loss."""
    lines = [line for line in run.metrics if finite(line.get("val_loss")) is not None]
    found = {name: column(lines, name)[1] for name in ("val_loss", *COSTS)}
    rounded = {name: [float(f"{value:.{DIGITS}g}") for value in values] for name, values in found.items()}
    return rounded | {"step": [int(step) for step in found["step"]]}


def _accuracies(found: Sequence[float | None]) -> dict[str, Any]:
    """Mean and spread of those of a task; nothing where runs have none."""
    known = [accuracy for accuracy in found if accuracy is not None]
    return {"accuracy": fmean(known), "accuracy_spread": spread(known)} if known else {}


def _differences(study: Study, rows: Sequence[dict[str, Any]], value: str) -> list[dict[str, Any]]:
    """Of each arm and each of its baselines, in the order of the baselines."""
    names = list(dict.fromkeys([*study.baselines, *(name for row in rows for name in study.baselines_of(row["arm"]))]))
    pairs = [(row, name) for name in names for row in rows if name in study.baselines_of(row["arm"])]
    return [found for row, name in pairs if (found := _difference(row, _named(rows, name), value))]


def _difference(row: Mapping[str, Any], baseline: Mapping[str, Any], value: str) -> dict[str, Any] | None:
    """Over the seeds with which both have finished."""
    ours, theirs = (
        {run["seed"]: run[value] for run in one["runs"] if run.get(value) is not None} for one in (row, baseline)
    )
    if not (common := [seed for seed in ours if seed in theirs]):
        return None
    found = paired([ours[seed] for seed in common], [theirs[seed] for seed in common])
    return {"arm": row["arm"], "baseline": baseline["arm"], **vars(found)}


def _named(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["arm"] == name)
