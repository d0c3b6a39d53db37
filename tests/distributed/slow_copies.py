"""Checkpoints that are copied only when the next optimizer step is about to change weights; runs on every rank."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from threading import Event
from typing import Any

from engine_runs import Layout, run_config
from trainer_runs import train_run, write_documents

from megasparse.checkpoint.writing import HostCopy
from megasparse.parallel import Mesh
from megasparse.training.checkpoints import Checkpointer

SAVED_STEPS = (4, 8)


def resumed_from_slow_copies(mesh: Mesh, zero_stage: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of metrics of a run, and of those that went on from the checkpoints which it saved meanwhile."""
    if mesh.is_first:
        write_documents(folder / "corpus", (20, 60), 4000)
    mesh.barrier()
    overrides = [
        f"data.train=[{{path: {folder / 'corpus'}}}]",
        "train.steps=12",
        "sparsity.update_interval=2",
        "train.save_interval=4",
        "train.keep_checkpoints=9",
        "train.valid_interval=0",
        "train.log_interval=1",
    ]
    config = run_config(overrides, Layout(data=mesh.data_parallel.size, zero=zero_stage))
    copy, wait, asked = HostCopy._copy, Checkpointer.wait_for_copy, Event()

    def as_late_as_can_be(*arguments: Any) -> Any:
        asked.wait(timeout=3)
        asked.clear()
        return copy(*arguments)

    def ask(checkpointer: Checkpointer) -> None:
        asked.set()
        wait(checkpointer)

    HostCopy._copy, Checkpointer.wait_for_copy = as_late_as_can_be, ask  # type: ignore[method-assign]
    lines = {"straight": train_run(mesh, config, folder / "straight")}
    for step in SAVED_STEPS:
        if mesh.is_first:
            name = f"step-{step:08d}"
            copytree(folder / "straight" / "checkpoints" / name, folder / f"from {step}" / "checkpoints" / name)
        mesh.barrier()
        lines[f"from {step}"] = train_run(mesh, config, folder / f"from {step}")
    return lines
