"""Saves that fail, told and survived; runs on every rank."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from engine_runs import Layout, advance, build, run_config

from megasparse.launching.failures import SkippedStepsError
from megasparse.methods.callback import Step, no_beat
from megasparse.parallel import Mesh
from megasparse.training import checkpoints
from megasparse.training.checkpoints import Checkpointer, Checkpointing
from megasparse.training.state import TrainState

FAILING_STEPS = (2, 4)


def disk_full_on(rank: int):
    """In place of ``write_part``: the disk of one rank has no room for the checkpoints of some steps."""
    write = checkpoints.write_part

    def written(partial: Path, own: int, content: Any) -> None:
        if own == rank and any(f"{step:08d}" in partial.name for step in FAILING_STEPS):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial / "rank"))
        write(partial, own, content)

    return written


def saves(mesh: Mesh, folder: Path, failing_rank: int) -> dict[str, Any]:
    config = run_config(["model.hidden_size=64", "sparsity.block_size=16"], Layout(data=mesh.data_parallel.size))
    engine, controller = build(mesh, config)
    advance(mesh, engine, controller, 0, 1)
    notes: list[str] = []
    state = TrainState()
    checkpointer = Checkpointer(folder, config, mesh, engine, engine.rules)
    callback = Checkpointing(checkpointer, 1, state, notes.append, no_beat)
    checkpoints.write_part = disk_full_on(failing_rank)

    def finish_step(number: int) -> None:
        state.step = number
        callback.after_step(Step(number - 1))

    finish_step(1)
    finish_step(2)
    # The failure of step 2 is told here, training goes on, and step 3 is saved.
    finish_step(3)
    callback.end_run("finished")
    told, names = list(notes), sorted(path.name for path in folder.iterdir())
    finish_step(4)
    message = "nothing"
    try:
        callback.end_run("finished")
    except checkpoints.CheckpointError as error:
        message = str(error)
    after_failure = sorted(path.name for path in folder.iterdir())
    # An error that all ranks raise alike does not cost the checkpoint that is being written.
    try:
        with checkpointer:
            finish_step(5)
            raise SkippedStepsError(7, 3, "a loss is not finite")
    except SkippedStepsError:
        mesh.barrier()
    return {
        "told": told,
        "names": names,
        "message": message,
        "after_failure": after_failure,
        "at_the_end": sorted(path.name for path in folder.iterdir()),
    }
