"""Trains as launch/pretrain.py does, but after step 9 a mask bit of the second sparse layer flips on the last rank."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from megasparse.training.loop import Trainer

STEP = 9


class FaultyMemory:
    """Stands before ``Trainer.train_step``."""

    def __init__(self) -> None:
        self._train_step = Trainer.train_step

    def train_step(self, trainer: Trainer, *arguments: Any) -> Any:
        result = self._train_step(trainer, *arguments)
        if trainer.mesh.rank == trainer.mesh.world_size - 1 and trainer.state.step == STEP:
            (method,) = trainer.methods
            method.controller.topologies[list(method.controller.topologies)[1]].mask.view(-1)[2] ^= True
        return result


if __name__ == "__main__":
    faulty = FaultyMemory()
    Trainer.train_step = lambda trainer, *arguments: faulty.train_step(trainer, *arguments)
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"), run_name="__main__")
