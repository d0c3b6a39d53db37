"""Puts a run into the queue of a SLURM cluster: frozen code, frozen configuration, a batch script.

    job = SlurmJob(nodes=2, tasks_per_node=8, time="04:00:00", layout="task-per-rank")
    check_start(config, job.world_size, job.device)         # megasparse.training.preparation
    folder = write_job(config, job, code=repository)        # <run.folder>/<run.name>/job-<n>
    print(submit(folder, variables=os.environ))             # what sbatch answers

A job folder holds ``code/`` (the sources as they are now), ``config.yaml`` (resolved), ``job.sbatch``, and the job's
output. What is edited while the job waits, or between its restarts, does not reach it. The batch script is a file of
``launch/slurm/`` with another head. Raises ConfigError for what the user must mend, before anything is written.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megasparse.config.loader import ConfigError, control_character, save_config
from megasparse.config.schema import RunConfig
from megasparse.utils.files import write_at_once

TEMPLATES = {"task-per-rank": "task_per_rank.sbatch", "task-per-node": "task_per_node.sbatch"}
"""Layout -> file in launch/slurm/."""

END_OF_HEAD = "# --- Nothing below this line needs an edit.\n"
CODE_PARTS = ("megasparse", "launch", "tools", "configs", "setup.py", "pyproject.toml", "constraints.txt")
SUBMIT_SECONDS = 120

TIME_FORMS = (
    r"(?P<minutes>\d+)(:(?P<seconds>\d+))?",
    r"(?P<hours>\d+):(?P<minutes>\d+):(?P<seconds>\d+)",
    r"(?P<days>\d+)-(?P<hours>\d+)(:(?P<minutes>\d+)(:(?P<seconds>\d+))?)?",
)
TIME_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of SLURM. Raises ConfigError naming the option of submit.py."""

    nodes: int
    tasks_per_node: int
    """Ranks on each node, whoever starts them."""
    time: str
    layout: str = "task-per-rank"
    warning_seconds: int = 180
    max_restarts: int = 20
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    """Cores of each rank."""
    setup: Path | None = None
    """Shell file that the job sources first."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, such as --constraint=a100."""

    def __post_init__(self) -> None:
        for name in ("layout", "time", "partition", "account", "setup"):
            _refuse_control_characters(f"--{name}", getattr(self, name))
        if self.layout not in TEMPLATES:
            raise ConfigError(f"--layout: {self.layout!r}; must be one of {', '.join(TEMPLATES)}")
        least = {"nodes": 1, "tasks_per_node": 1, "max_restarts": 0, "warning_seconds": 1}
        for name, lowest in {**least, "gpus_per_node": 1, "cpus_per_task": 1}.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name.replace('_', '-')}: {value}; must be {lowest} or more")
        if self.warning_seconds >= (seconds := time_limit_seconds(self.time)):
            raise ConfigError(
                f"--warning-seconds: {self.warning_seconds} is not below --time {self.time}; must be 1 to {seconds - 1}"
            )
        if self.setup is not None and not self.setup.is_file():
            raise ConfigError(f"--setup: no such file: {self.setup}")
        for word in self.options:
            if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", word) or control_character(word):
                raise ConfigError(f"--sbatch-option: {word!r}; must be --name or --name=value, as of sbatch")

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def device(self) -> str | None:
        """Whether the nodes have GPUs is known only where the job asks for them; this machine may have none."""
        return "cuda" if self.gpus_per_node else None


def _refuse_control_characters(name: str, value: str | Path | None) -> None:
    """A line break would begin a line of the batch script."""
    if found := control_character(str(value or "")):
        raise ConfigError(f"{name}: {str(value)!r} holds the control character {found!r}; must be one line")


def time_limit_seconds(text: str) -> int:
    """The length of a time limit as sbatch reads it."""
    for form in TIME_FORMS:
        if match := re.fullmatch(form, text, re.ASCII):
            seconds = sum(int(value or 0) * TIME_UNITS[unit] for unit, value in match.groupdict().items())
            if seconds > 0:
                return seconds
    raise ConfigError(
        f"--time: {text!r}; must be MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, "
        "DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS"
    )


def write_job(config: RunConfig, job: SlurmJob, code: Path) -> Path:
    """Write the job folder of a run that has been checked at the job's size. code: the repository."""
    run_folder = (Path(config.run.folder) / config.run.name).absolute()
    for name, path in (("run.folder", run_folder), ("working folder", Path.cwd()), ("folder of the code", code)):
        _refuse_control_characters(name, path)
    # Every start of the job goes on from the newest checkpoint, the first one too where there is one.
    config = config.model_copy(update={"train": config.train.model_copy(update={"resume": "auto"})})
    folder = _new_folder(run_folder)
    freeze_code(code, folder / "code")
    save_config(config, folder / "config.yaml")
    template = (folder / "code" / "launch" / "slurm" / TEMPLATES[job.layout]).read_text(encoding="utf-8")
    write_at_once(folder / "job.sbatch", render(job, config.run.name, run_folder, folder, template))
    return folder


def render(job: SlurmJob, name: str, run_folder: Path, folder: Path, template: str) -> str:
    """The batch script: a file of launch/slurm/ with the job's own head."""
    _, marker, body = template.partition(END_OF_HEAD)
    assert marker, "the batch scripts in launch/slurm/ say where their head ends"
    directives = [f"#SBATCH {shlex.quote(option)}" for option in _options(job, name, folder)]
    variables = {
        "RUN_FOLDER": run_folder,
        "CODE": folder / "code",
        "JOB_FOLDER": folder,
        "MAX_RESTARTS": job.max_restarts,
        # A setup file chooses its own environment.
        "PYTHON": "python" if job.setup else sys.executable,
        "SETUP": job.setup.absolute() if job.setup else "",
        "RANKS_PER_TASK": job.tasks_per_node if job.layout == "task-per-node" else 1,
    }
    assignments = [f"{key}={shlex.quote(str(value))}" for key, value in variables.items()]
    settings = f"SETTINGS=(--config {shlex.quote(str(folder / 'config.yaml'))})"
    head = ["#!/bin/bash", "# Written by launch/slurm/submit.py.", *directives, "", settings, *assignments]
    return "\n".join(head) + "\n" + END_OF_HEAD + body


def submit(folder: Path, variables: Mapping[str, str]) -> str:
    """Hand the job to sbatch, with these environment variables; returns its answer, which names the job."""
    command = submit_command(folder)
    try:
        done = subprocess.run(
            command,
            env=dict(variables),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=SUBMIT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(f"sbatch: not found on this machine; {folder} is written, not submitted") from None
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused {folder / 'job.sbatch'}: {done.stderr.strip()}")
    return done.stdout.strip()


def submit_command(folder: Path) -> list[str]:
    return ["sbatch", str(folder / "job.sbatch")]


def freeze_code(source: Path, target: Path) -> None:
    """Copy the sources as they are now: of a git checkout what git knows or would add, else all but caches."""
    files = _git(source, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE_PARTS)
    if files is None:
        target.mkdir(parents=True)
        for part in CODE_PARTS:
            if (source / part).is_dir():
                shutil.copytree(source / part, target / part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            elif (source / part).is_file():
                shutil.copy2(source / part, target / part)
        return
    for name in filter(None, files.split("\0")):
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, target / name)
    # Commit, then the files that differ from it.
    commit = _git(source, "rev-parse", "HEAD") or "no commit\n"
    changes = _git(source, "status", "--short", "--untracked-files=all", "--", *CODE_PARTS) or ""
    write_at_once(target / "REVISION", os.fsencode(commit + changes))


def _git(folder: Path, *words: str) -> str | None:
    """Standard output of a git command; None where there is no git, or the folder is not the top of a checkout."""
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, timeout=SUBMIT_SECONDS, check=False
        )
    except FileNotFoundError:
        return None
    # As Python names files, whatever the locale.
    return os.fsdecode(done.stdout) if done.returncode == 0 else None


def _new_folder(run_folder: Path) -> Path:
    """The first job folder that is free; made at once, so that two submissions cannot share one."""
    number = 1
    while True:
        folder = run_folder / f"job-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def _options(job: SlurmJob, name: str, folder: Path) -> Iterator[str]:
    """Options of sbatch, the user's own last: of equal ones the last counts."""
    per_rank = job.layout == "task-per-rank"
    yield f"--job-name={name}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={job.tasks_per_node if per_rank else 1}"
    yield f"--time={job.time}"
    yield f"--signal=B:USR1@{job.warning_seconds}"
    yield "--requeue"
    yield "--open-mode=append"
    # Relative paths in the configuration mean what they meant where the job was submitted.
    yield f"--chdir={Path.cwd()}"
    yield f"--output={_literal(folder)}/slurm-%j.out"
    if job.cpus_per_task is not None:
        yield f"--cpus-per-task={job.cpus_per_task * (1 if per_rank else job.tasks_per_node)}"
    optional: Sequence[tuple[str, Any]] = (
        ("partition", job.partition),
        ("account", job.account),
        ("gpus-per-node", job.gpus_per_node),
    )
    yield from (f"--{option}={value}" for option, value in optional if value is not None)
    yield from job.options


def _literal(path: Path) -> str:
    """A path as sbatch's file name patterns want it."""
    return str(path).replace("%", "%%")
