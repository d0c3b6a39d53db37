"""What a run writes down while it trains: metrics, topology updates, pictures of topologies. Rank 0 only.

``metrics.jsonl`` has a line per logged step, ``topology.jsonl`` a line per topology update, and
``topology/<layer>/step-N.png`` shows the mask of a few layers, bright where it is active. On a restart, lines of
steps that will be done again are removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from megasparse.sparsity.controller import TopologyReport

PICTURE_SIDE = 128
"""Largest side of a topology picture, in pixels."""


class ScalarWriter(Protocol):
    def add_scalar(self, tag: str, value: float, step: int) -> None: ...
    def close(self) -> None: ...


class RunRecords:
    """Open files of a run folder. resume_step: finished steps of the checkpoint that the run goes on from."""

    def __init__(self, folder: Path, *, resume_step: int, tensorboard: bool) -> None:
        self.folder = folder
        for name in ("metrics.jsonl", "topology.jsonl"):
            _drop_lines_after(folder / name, resume_step)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._topology = (folder / "topology.jsonl").open("a", encoding="utf-8")
        self._scalars = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def metrics(self, values: Mapping[str, Any]) -> None:
        """values: `step` and the numbers of the line."""
        _write_line(self._metrics, values)
        if self._scalars is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self._scalars.add_scalar(name, value, values["step"])

    def topology(self, report: TopologyReport, kernels: Mapping[str, int]) -> None:
        """kernels: number of sparse layers by kernel after the change."""
        # Counted like the metrics, by finished steps: the change belongs to the step that it ended.
        _write_line(self._topology, {**asdict(report), "step": report.step + 1, "kernels": dict(kernels)})

    def picture(self, layer: str, mask: Tensor, step: int) -> None:
        """Write the mask of a layer, bool [rows, columns], as a grey picture; large masks are averaged."""
        target = self.folder / "topology" / layer / f"step-{step:08d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        grey = (_shrink(mask.cpu().numpy().astype(np.float32)) * 255).round().astype(np.uint8)
        Image.fromarray(grey, mode="L").save(target)

    def close(self) -> None:
        self._metrics.close()
        self._topology.close()
        if self._scalars is not None:
            self._scalars.close()


def _write_line(file: Any, values: Mapping[str, Any]) -> None:
    file.write(json.dumps(values) + "\n")
    file.flush()


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep the whole lines of finished steps only; atomically, so that a kill here loses nothing."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


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


def _tensorboard(folder: Path, resume_step: int) -> ScalarWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)
