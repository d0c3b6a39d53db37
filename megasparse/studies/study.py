"""A study from its file to table and page, or to what it would cost.

    found = Studied(load_study(file), file)
    found.dry_run(console)
    results = found.run(command, print)

First learning rates are chosen where an arm has several, on the seed of the sweep; then every arm runs on every seed.
Whatever has finished is not run again, so a study can be killed at any moment, and arms and seeds can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megasparse.config.schema import RunConfig
from megasparse.launching.run_lock import hold_folder
from megasparse.monitoring.console import print_table
from megasparse.planning.assumptions import parse_assumptions
from megasparse.planning.cluster import make_cluster
from megasparse.planning.forecast import forecast
from megasparse.planning.probe import here_chip, measure
from megasparse.studies.format import Study
from megasparse.studies.jobs import Job, best_rate, digest, inputs_of, seed_jobs, sweep_jobs, with_known, write_configs
from megasparse.studies.page import write_page
from megasparse.studies.results import collect, read_known, write_results
from megasparse.studies.running import Command, Crew, make_slots
from megasparse.studies.solving import solve
from megasparse.studies.tables import arm_rows, difference_rows, plan_rows, sweep_rows, total_seconds
from megasparse.utils.format import format_flops, format_seconds

RESULTS, PAGE = "results.json", "study.html"


class Studied:
    """A study whose arms are solved. Raises ConfigError where one cannot be."""

    def __init__(self, study: Study, file: Path, known: Sequence[Path] = (), *, without_models: bool = False) -> None:
        """known: results of earlier studies, of which runs with the same settings and data are taken. without_models:
        for a dry run before they are made, see ``solve``."""
        self.study = study
        self.place = Path(study.folder) / study.name
        self.known = read_known(known)
        self._data: dict[str, Any] = {}
        """What the runs read, by arm: each fingerprint reads some megabytes."""
        self.arms, self.budget = solve(study, file, without_models=without_models)
        self.sweep = [job for arm in self.arms for job in sweep_jobs(self.place, arm, study.sweep_seed)]
        self.slots = make_slots(study.processes, len(self.sweep) + len(self.arms) * len(study.seeds))

    def dry_run(self, console: Console) -> None:
        """Print what every arm costs, and the time on this machine where it can be measured: on its processor."""
        ranks = len(self.slots)
        for step in self.study.preparations:
            done = "is there" if step.is_done else "is to be made first, by " + " ".join(step.run[:1])
            console.print(f"{step.makes} {done}", soft_wrap=True, markup=False, highlight=False)
        on_gpus = "CUDA_VISIBLE_DEVICES" in self.slots[0]
        seconds = {} if on_gpus else {arm.name: training_seconds(arm.config, ranks) for arm in self.arms}
        title = f"{self.study.name}: a budget of {format_flops(self.budget)}, {ranks} runs at a time"
        print_table(plan_rows(self.arms, self.budget, seconds), console, title)
        total = total_seconds(self.arms, len(self.study.seeds), seconds, ranks)
        runs = len(self.sweep) + len(self.arms) * len(self.study.seeds)
        words = "unknown on GPUs" if total is None else format_seconds(total)
        console.print(f"{runs} runs; time in all: {words}, without starts and validation", highlight=False)

    def run(self, command: Command, tell: Callable[[str], None]) -> dict[str, Any]:
        """Run what has not finished, and write results and page. Raises Stopped, and ConfigError for a folder that is
        in use or holds runs with other settings or on other data."""
        with hold_folder(self.place, tell), Crew(self.slots, command, tell) as crew:
            self.sweep = self._with_known(self.sweep)
            write_configs(self.sweep, self._inputs)
            failures = crew.run(self.sweep, lambda failures: self._write([], failures))
            jobs = list[Job]()
            for arm in self.arms:
                rate = best_rate(arm, self.sweep)
                if rate is None:
                    failures[arm.name] = "no run of its sweep has a validation loss"
                    tell(f"{arm.name}: left out: {failures[arm.name]}")
                    continue
                if len(arm.rates) > 1:
                    tell(f"{arm.name}: learning rate {rate:g} of {', '.join(f'{one:g}' for one in arm.rates)}")
                jobs += seed_jobs(self.place, arm, rate, self.study.seeds)
            # Seed by seed: of what is stopped early all arms have been run on the same seeds.
            jobs = self._with_known(sorted(jobs, key=lambda job: self.study.seeds.index(job.seed)))
            write_configs(jobs, self._inputs)
            before = dict(failures)
            failures |= crew.run(jobs, lambda failures: self._write(jobs, before | failures))
            results = self._write(jobs, failures)
            write_page(results, self.place / PAGE)
        return results

    def _write(self, jobs: Sequence[Job], failures: Mapping[str, str]) -> dict[str, Any]:
        """The results so far."""
        results = collect(self.study, self.arms, self.budget, self.sweep, jobs, failures, self._digest)
        write_results(results, self.place / RESULTS)
        return results

    def _with_known(self, jobs: Sequence[Job]) -> list[Job]:
        return with_known(jobs, self.known, self._digest) if self.known else list(jobs)

    def _inputs(self, job: Job) -> dict[str, Any]:
        if job.arm not in self._data:
            self._data[job.arm] = inputs_of(job.config)
        return self._data[job.arm]

    def _digest(self, job: Job) -> str:
        return digest(job, self._inputs(job))


def print_results(results: Mapping[str, Any], console: Console) -> None:
    for title, rows in (
        ("Learning rates", sweep_rows(results)),
        (results["study"], arm_rows(results)),
        ("Paired differences of the validation loss", difference_rows(results)),
        ("Paired differences of the task accuracy", difference_rows(results, "accuracy_differences")),
    ):
        if rows:
            print_table(rows, console, title)


def training_seconds(config: RunConfig, processes: int) -> float:
    """Of a whole run beside so many others, from rates measured on this machine's processor in some seconds."""
    found = measure(config, processes)
    cluster = make_cluster(here_chip(found), 1)
    result = forecast(config, cluster, parse_assumptions([]), make_rates=found.rates, measured=found.facts())
    return result["time"]["seconds"]
