"""The callback that profiles a few steps with torch's profiler, for `train.profile_steps`.

The trace of every rank, `profile/rank-00000.json` in the run's folder, is opened with https://ui.perfetto.dev or
chrome://tracing.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megasparse.config.schema import RunConfig
from megasparse.methods.callback import Callback, Step
from megasparse.parallel import Mesh
from megasparse.utils.files import temporary_beside

SKIPPED = 3
"""Steps of a start before those that are profiled: in the first ones kernels are compiled and memory is taken."""


class Profile(Callback):
    """Profiles `train.profile_steps` steps, or as many as there are, and writes the trace after the last of them."""

    def __init__(self, config: RunConfig, folder: Path, mesh: Mesh) -> None:
        self._count, self._folder, self._rank = config.train.profile_steps, folder / "profile", mesh.rank
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._first: int | None = None
        self._running = False

    def begin_step(self, step: Step) -> None:
        if self._first is None:
            self._first = step.index + SKIPPED
        if step.index == self._first:
            self._profile.start()
            self._running = True

    def after_step(self, step: Step) -> None:
        assert self._first is not None
        if self._running and step.number == self._first + self._count:
            step.notes.append(f"step {step.number:,}: trace of {self._count} steps: {self._write()}")

    def end_run(self, reason: str) -> None:
        if self._running:
            self._write()

    def _write(self) -> Path:
        self._profile.stop()
        self._running = False
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"rank-{self._rank:05d}.json"
        temporary = temporary_beside(path)
        self._profile.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        return path
