"""The runs of a study and their files: which there are, which have finished, what they reached.

    jobs = with_known(seed_jobs(place, arm, rate, seeds), known)
    write_configs(jobs, data_of)                 # refuses what was begun with other settings, or on other data
    jobs[0].summary(), jobs[0].finished

A run is a run folder as any other, in `runs/` of the folder of the study; its configuration lies in `configs/`, what it
prints in `logs/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megasparse.checkpoint.model_folder import CHECKSUMS
from megasparse.config.loader import ConfigError, changed_settings, load_config, save_config
from megasparse.config.schema import RunConfig
from megasparse.data.fingerprints import changes, run_fingerprint
from megasparse.data.vocabulary import file_sha256
from megasparse.studies.solving import SolvedArm, with_fields
from megasparse.utils.files import write_json
from megasparse.utils.format import finite

LEFT_OUT = {"run": {"name", "folder"}, "train": {"resume", "save_interval", "keep_checkpoints", "trackers"}}
"""Settings that change nothing of what is found."""
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
    known: Mapping[str, Any] | None = None
    """What was found with the same settings on the same data elsewhere, as ``results.py`` writes it."""

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
    def data_file(self) -> Path:
        """What it reads, as ``inputs_of`` gives it."""
        return self.config_file.with_suffix(".data.json")

    @property
    def log_file(self) -> Path:
        return self.place / "logs" / f"{self.name}.txt"

    def summary(self) -> dict[str, Any]:
        """Empty where there is none that can be read. Of a run that is known: what is known of it."""
        if self.known is not None:
            return {**self.known, "finished": True}
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


def inputs_of(config: RunConfig) -> dict[str, Any]:
    """Fingerprints of all that decides what a run finds besides its settings: data, and where there are any the model
    that it starts from, its teacher, and the task."""
    models = {"init_from": config.train.init_from, "teacher": config.distillation.teacher}
    files = {name: Path(folder) / CHECKSUMS for name, folder in models.items() if folder is not None}
    if config.task.path is not None:
        files["task"] = Path(config.task.path)
    return run_fingerprint(config) | {name: file_sha256(path) for name, path in files.items() if path.is_file()}


def digest(job: Job, data: object) -> str:
    """Equal for runs that find the same: of all settings that are not the default, and of ``inputs_of`` the run."""
    settings = job.config.model_dump(mode="json", exclude_defaults=True, exclude=LEFT_OUT)
    return hashlib.sha256(json.dumps([settings, data], sort_keys=True).encode()).hexdigest()[:16]


def with_known(
    jobs: Sequence[Job], known: Mapping[str, Mapping[str, Any]], digest_of: Callable[[Job], str]
) -> list[Job]:
    """The jobs, those told that are known and have not been run here. known: by digest."""
    return [job if job.finished else replace(job, known=known.get(digest_of(job))) for job in jobs]


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


def write_configs(jobs: Sequence[Job], data_of: Callable[[Job], dict[str, Any]]) -> None:
    """Write each configuration, and what its run reads. Raises ConfigError where one of the runs was begun with other
    settings, or on other data."""
    jobs = [job for job in jobs if job.known is None]
    for job in jobs:
        if job.config_file.is_file() and job.folder.exists():
            changed = changed_settings(load_config([job.config_file]), job.config)
            if changed:
                raise _other_run(job, "with other settings", changed)
            if job.data_file.is_file() and (changed := changes(_read_inputs(job.data_file), data_of(job))):
                raise _other_run(job, "on other data or models", changed)
    for job in jobs:
        save_config(job.config, job.config_file)
        write_json(job.data_file, data_of(job))


def _other_run(job: Job, how: str, changed: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{job.folder} was begun {how}: {', '.join(changed)}; must be another name of the study, or delete this folder "
        "to train anew"
    )


def _read_inputs(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}; must be what a study wrote there") from None


def _job(place: Path, arm: SolvedArm, rate: float, seed: int) -> Job:
    name, train = f"{arm.name}_lr{rate:g}_seed{seed}", arm.config.train
    config = with_fields(arm.config, "run", name=name, folder=str(place / "runs"), seed=seed)
    config = with_fields(config, "optimizer", lr=rate)
    interval = train.save_interval or max(train.steps // SAVES, 1)
    return Job(arm.name, seed, rate, with_fields(config, "train", resume="auto", save_interval=interval), place)
