"""Runs whose folder cannot be written, in part or at some time; on one rank, many in one process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from megasparse.config.loader import load_config
from megasparse.launching import LaunchEnvironment
from megasparse.methods.callback import Callback, Step
from megasparse.training.run import pretrain
from megasparse.utils.files import describe_failure

FINISHED = "finished"
ROOM, GROWTH = 2**13, 1.25
"""Free bytes of the first try that has some, and by what they grow: at least by as many, later by a factor."""
EACH_GOES_ON = 3
"""Of the runs that end early, each so many-th goes on when there is room."""


class DeleteFolder(Callback):
    """Deletes the run folder after a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step

    def after_step(self, step: Step) -> None:
        if step.number == self._step:
            shutil.rmtree(self._folder)


def attempt(words: Sequence[str], callbacks: Sequence[Callback] = ()) -> str:
    """`finished`, or the sentence with which the run ends; other errors than those that the user is told are raised."""
    try:
        pretrain(load_config([], words), LaunchEnvironment.from_variables(os.environ), callbacks=callbacks)
    except OSError as error:
        assert error.filename is not None, error
        return describe_failure(error)
    except ValueError as error:
        return str(error)
    return FINISHED


def with_folders_in_the_way(words: Sequence[str], folder: Path, names: Sequence[str]) -> dict[str, str]:
    """How a run ends where something that nobody could replace has the name of a file of it."""
    found = {}
    for number, name in enumerate(names):
        (folder / f"run-{number}" / name / "taken").mkdir(parents=True)
        found[name] = attempt([*words, f"run.name=run-{number}"])
    return found


def on_a_small_disk(words: Sequence[str], disk: Path) -> list[tuple[str, bool]]:
    """How runs end with ever more room on a disk, and whether they go on, and to their end, when there is more.

    Ends with the first that finishes by itself.
    """
    found: list[tuple[str, bool]] = []
    free = 0
    while not found or found[-1][0] != FINISHED:
        number = len(found)
        _leave_free(disk, free)
        free = max(free + ROOM, int(free * GROWTH))
        run = [*words, f"run.folder={disk / 'runs'}", f"run.name=run-{number}", "train.save_interval=4"]
        end = attempt(run)
        (disk / "filler").unlink()
        found.append((end, number % EACH_GOES_ON != 0 or _goes_on(run, disk / "runs" / f"run-{number}")))
        shutil.rmtree(disk / "runs")
    return found


def _goes_on(words: Sequence[str], folder: Path) -> bool:
    """Whether the run goes on to its end, all its metrics are there, and nothing of a checkpoint that failed."""
    end = attempt([*words, "train.resume=auto"])
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    partial = [name for name in os.listdir(folder / "checkpoints") if not name.startswith("step-")]
    return end == FINISHED and steps == [3, 6, 9, 12] and not partial


def deleted_after(words: Sequence[str], folder: Path, steps: Sequence[int]) -> list[tuple[str, bool]]:
    """How runs end whose folder is deleted after a step, and whether it is still gone."""
    found = []
    for step in steps:
        name = f"deleted-{step}"
        end = attempt([*words, f"run.name={name}"], [DeleteFolder(folder / name, step)])
        found.append((end, not (folder / name).exists()))
    return found


def through_planted_links(words: Sequence[str], folder: Path, names: Sequence[str], target: Path) -> dict[str, str]:
    """How a run ends in a folder where names lead elsewhere; the content of `target` must stay."""
    found = {}
    for number, name in enumerate(names):
        run = folder / f"linked-{number}"
        run.mkdir()
        (run / name).symlink_to(target)
        found[name] = attempt([*words, f"run.name={run.name}", "train.resume=auto", "train.profile_steps=1"])
        assert target.read_text() == "mine", name
        if found[name] == FINISHED:
            assert (run / name).is_file() and not (run / name).is_symlink(), name
    return found


def _leave_free(disk: Path, count: int) -> None:
    space = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(space.f_bavail * space.f_frsize - count))
