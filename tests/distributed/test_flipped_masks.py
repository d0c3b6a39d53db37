"""Bits that flip in masks at any time of a run, on any rank: all are found in time, and none is saved."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_runs import Layout, divided, run_config
from harness import run_distributed
from trainer_runs import train_run, write_documents

from megasparse.launching.failures import MaskError
from megasparse.methods.callback import Callback, Step
from megasparse.parallel import Mesh
from megasparse.training.loop import Trainer

SETTINGS = [
    "model.hidden_size=32",
    "train.steps=20",
    "train.save_interval=5",
    "train.keep_checkpoints=9",
    # Every update changes something, up to the last one.
    "sparsity.update_interval=3",
    "sparsity.drop_fraction=0.5",
    "sparsity.drop_anneal=none",
    "sparsity.restoration_end=0.9",
    "data.valid_fraction=0",
]
BLOCKS, WEIGHTS = ["sparsity.block_size=8"], ["sparsity.block_size=1"]
TRIES = 5


@dataclass
class Flip(Callback):
    """One bit of a mask, after a step."""

    trainer: Trainer
    after: int
    rank: int
    chance: random.Random
    reached: int = 0

    def after_step(self, step: Step) -> None:
        self.reached = step.number
        name = self.chance.choice(list(self.trainer.engine.model.sparse_layers()))
        mask = self.trainer.engine.model.sparse_layers()[name].mask.view(-1)
        place = self.chance.randrange(mask.numel())
        if step.number == self.after and self.trainer.mesh.rank == self.rank:
            mask[place] ^= True


def flip_at_random(mesh: Mesh, cases: list[tuple[str, list[str], Layout]], folder: Path) -> list[str]:
    """What was not found in time, or was saved."""
    missed = []
    for name, overrides, layout in cases:
        own, config = divided(mesh, layout.tensor), run_config(overrides, layout)
        for number in range(TRIES):
            chance, watches = random.Random(f"{name} {number}"), []
            after, rank = chance.randrange(1, config.train.steps), chance.randrange(mesh.world_size)

            def watch(trainer: Trainer, after=after, rank=rank, chance=chance, watches=watches) -> Flip:
                watches.append(Flip(trainer, after, rank, chance))
                return watches[-1]

            place = folder / f"{name}-{number}"
            try:
                train_run(own, config, place, watch=watch)
                found = False
            except MaskError as error:
                found = f"changed in the memory of rank {rank} " in str(error)
            # The flip comes before the save of its own step; updates come before the step that they belong to.
            save, update = -(-after // 5) * 5, -(-after // 3) * 3
            saved = [int(path.name.removeprefix("step-")) for path in (place / "checkpoints").glob("step-*")]
            if not found or watches[0].reached > min(save, update) or any(step >= after for step in saved):
                missed.append(f"{name}: after step {after} on rank {rank}: {found}, {watches[0].reached}, {saved}")
            mesh.barrier()
    return missed


@pytest.mark.parametrize(
    "cases",
    [
        [("blocks", BLOCKS, Layout(2)), ("weights", WEIGHTS, Layout(1, 2))],
        pytest.param(
            [("weights", WEIGHTS, Layout(2, zero=3)), ("blocks", BLOCKS, Layout(1, 2))], marks=pytest.mark.exhaustive
        ),
    ],
)
def test_every_flip_is_found_before_the_next_update_or_save(tmp_path: Path, cases: list) -> None:
    data = f"data.train=[{{path: {write_documents(tmp_path / 'corpus', (20, 60), 20_000)}}}]"
    cases = [(name, [*SETTINGS, data, *words], layout) for name, words, layout in cases]
    for missed in run_distributed(flip_at_random, 2, cases, tmp_path):
        assert not missed
