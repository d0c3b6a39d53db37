"""What a run writes down while it trains: metrics, topology updates, pictures of topologies. Rank 0 only.

    with RunRecords(folder, resume_step=0, trackers=["tensorboard"], parameters=sections, warn=print) as records:
        records.metrics({"step": 10, "loss": 2.5})

``metrics.jsonl`` has a line per logged step, ``topology.jsonl`` a line per topology update (training methods may write
files of their own, whose names stand in ``records.json``), and ``topology/<layer>/step-N.png`` shows the mask of a few
layers, bright where it is active. On a restart, lines of steps that will be done again are removed, and so are damaged
ones, with a warning; files that no run has written stay as they are. The numbers of a line of metrics go to the
trackers as well.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from megasparse.monitoring.tracked_run import TrackedRun, scalars_of
from megasparse.monitoring.trackers import start_trackers
from megasparse.utils.files import write_at_once, write_json
from megasparse.utils.json_lines import JsonLinesWriter, name_lines, read_json_lines

NAMES = "records.json"
"""In a run folder: which files of lines are the run's own."""
PICTURE_SIDE = 128
"""Largest side of a topology picture, in pixels."""


class RunRecords:
    """Open files of a run folder, and its trackers.

    resume_step: finished steps of the checkpoint that the run goes on from. lines: how many each file should have up to
    there, kept up to date from there on. parameters: what trackers are to show of the configuration and the plan. warn:
    told of trackers that fail, and of lines that are damaged or missing. What cannot be written is an
    OSError that names the file; so is a file that was deleted meanwhile, perhaps with its folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int,
        lines: dict[str, int] | None = None,
        trackers: Sequence[str] = (),
        parameters: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self._trackers = start_trackers(trackers, TrackedRun(folder, resume_step, parameters or {}), warn)
        self._lines = {} if lines is None else lines
        # Other files of lines in the folder are the user's.
        self._names = {"metrics", "topology", *self._lines, *_recorded_names(folder)}
        ours = [
            path for name in sorted(self._names) if (path := folder / f"{name}.jsonl").exists() or path.is_symlink()
        ]
        kept = {path.stem: _drop_lines_after(path, resume_step, warn) for path in ours}
        for name, count in self._lines.items():
            if kept.get(name, 0) < count:
                warn(
                    f"{folder / name}.jsonl: {count - kept.get(name, 0):,} of {count:,} lines up to step "
                    f"{resume_step:,} are missing"
                )
        self._lines.update({name: count for name, count in kept.items() if name not in self._lines})
        self._files = {name: JsonLinesWriter(folder / f"{name}.jsonl") for name in ("metrics", "topology")}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """values: `step` and the numbers of the line."""
        self.record("metrics", values)
        for tracker in self._trackers:
            tracker.scalars(values["step"], scalars_of(_without_nan(values)))

    def record(self, name: str, values: Mapping[str, Any]) -> None:
        """Add a line to `<name>.jsonl`. values: `step`, finished steps, and what happened in it. Numbers that are not
        finite, which JSON does not know, become null."""
        if name not in self._names:
            # Before the file is there, so that a later start knows it as the run's.
            self._names.add(name)
            write_json(self.folder / NAMES, sorted(self._names))
        if name not in self._files:
            self._files[name] = JsonLinesWriter(self.folder / f"{name}.jsonl")
        self._files[name].write(_without_nan(values))
        self._lines[name] = self._lines.get(name, 0) + 1

    def picture(self, layer: str, mask: Tensor, step: int) -> None:
        """Write the mask of a layer, bool [rows, columns], as a grey picture; large masks are averaged."""
        target = self.folder / "topology" / layer / f"step-{step:08d}.png"
        grey = (_shrink(mask.cpu().numpy().astype(np.float32)) * 255).round().astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grey, mode="L").save(buffer, format="PNG")
        for folder in (target.parent.parent, target.parent):
            folder.mkdir(exist_ok=True)
        write_at_once(target, buffer.getvalue(), make_folder=False)

    def close(self, *, failed: bool = False) -> None:
        """failed: the run ended with an error."""
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.close(failed=failed)


def _recorded_names(folder: Path) -> list[str]:
    """Empty where no run has written any but the usual ones, or what it wrote cannot be read."""
    try:
        found = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    names = found if isinstance(found, list) else []
    return [name for name in names if isinstance(name, str) and re.fullmatch(r"[\w-]+", name)]


def _without_nan(values: Any) -> Any:
    """With None for each number that is not finite."""
    if isinstance(values, Mapping):
        return {key: _without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _drop_lines_after(path: Path, step: int, warn: Callable[[str], None]) -> int:
    """Keep the whole lines of finished steps only; atomically, so that a kill here loses nothing. Their number."""
    if path.is_symlink():
        return 0  # refused when it is opened
    lines, damaged = read_json_lines(path)
    if damaged:
        warn(f"{path}: {name_lines(damaged)} cannot be read, as after a power cut: removed")
    kept = [line.content + b"\n" for line in lines if line.values["step"] <= step]
    write_at_once(path, b"".join(kept))
    return len(kept)


def _shrink(picture: np.ndarray) -> np.ndarray:
    """Average over cells until no side is longer than PICTURE_SIDE."""
    for axis in (0, 1):
        factor = -(-picture.shape[axis] // PICTURE_SIDE)
        if factor > 1:
            edges = np.arange(0, picture.shape[axis], factor)
            sizes = np.diff([*edges, picture.shape[axis]])
            shape = (-1, 1) if axis == 0 else (1, -1)
            picture = np.add.reduceat(picture, edges, axis=axis) / sizes.reshape(shape)
    return picture
