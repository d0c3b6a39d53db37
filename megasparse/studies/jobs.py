"""The runs of a study and their files: which there are, which have finished, what they reached.

    jobs = seed_jobs(place, arm, rate, seeds)
    write_configs(jobs)                          # refuses what was begun with other settings
    jobs[0].summary(), jobs[0].finished

A run is a run folder as any other, in `runs/` of the folder of the study; its configuration lies in `configs/`, what it
prints in `logs/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError, changed_settings, load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.studies.solving import SolvedArm, with_fields
from megasparse.utils.format import finite

SAVES = 10
"""Checkpoints of a run that asks for none, so that it can be killed."""


@dataclass(frozen=True)
class Job:
    """A run of an arm with one seed and one learning rate."""

    arm: str
    seed: int
    rate: float
    config: RunConfig
    place: Path
    """Folder of the study."""

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def folder(self) -> Path:
        return self.place / "runs" / self.name

    @property
    def config_file(self) -> Path:
        return self.place / "configs" / f"{self.name}.yaml"

    @property
    def log_file(self) -> Path:
        return self.place / "logs" / f"{self.name}.txt"

    def summary(self) -> dict[str, Any]:
        """Empty where there is none that can be read."""
        try:
            found = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def finished(self) -> bool:
        return self.summary().get("finished") is True

    @property
    def val_loss(self) -> float | None:
        """Final one of a run that has finished; None: there is none, or it is not finite."""
        summary = self.summary()
        return finite(summary.get("val_loss")) if summary.get("finished") is True else None


def sweep_jobs(place: Path, arm: SolvedArm, seed: int) -> list[Job]:
    """A run for each learning rate; none where there is no choice."""
    return [_job(place, arm, rate, seed) for rate in arm.rates] if len(arm.rates) > 1 else []


def seed_jobs(place: Path, arm: SolvedArm, rate: float, seeds: Sequence[int]) -> list[Job]:
    return [_job(place, arm, rate, seed) for seed in seeds]


def best_rate(arm: SolvedArm, sweep: Sequence[Job]) -> float | None:
    """That of the lowest final validation loss; None where no run of the sweep has one."""
    if len(arm.rates) == 1:
        return arm.rates[0]
    losses = {job.rate: job.val_loss for job in sweep if job.arm == arm.name}
    known = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(known, key=lambda rate: known[rate]) if known else None


def write_configs(jobs: Sequence[Job]) -> None:
    """Write each configuration. Raises ConfigError where one of the runs was begun with another."""
    for job in jobs:
        if job.config_file.is_file() and job.folder.exists():
            changes = changed_settings(load_config([job.config_file]), job.config)
            if changes:
                raise ConfigError(
                    f"{job.folder} was begun with other settings: {', '.join(changes)}; must be another name of the "
                    "study, or delete this folder to train anew"
                )
    for job in jobs:
        save_config(job.config, job.config_file)


def _job(place: Path, arm: SolvedArm, rate: float, seed: int) -> Job:
    name, train = f"{arm.name}_lr{rate:g}_seed{seed}", arm.config.train
    config = with_fields(arm.config, "run", name=name, folder=str(place / "runs"), seed=seed)
    config = with_fields(config, "optimizer", lr=rate)
    interval = train.save_interval or max(train.steps // SAVES, 1)
    return Job(arm.name, seed, rate, with_fields(config, "train", resume="auto", save_interval=interval), place)
