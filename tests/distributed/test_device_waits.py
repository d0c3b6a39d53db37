"""How often a training step makes the host wait for the device. A CPU never waits: calls are counted instead."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

from deepspeed.accelerator import get_accelerator
from engine_runs import Layout, build, make_batches, run_config, train_step
from harness import run_distributed

from megasparse.parallel import Mesh

SPARSE = ["train.steps=6", "sparsity.points=[[0,0.5],[1,0.5]]"]


def synchronisations(mesh: Mesh) -> dict[str, int]:
    """By stage: how often DeepSpeed waits for everything that the device has to do, over some steps."""
    found = {}
    for stage in (1, 2, 3):
        config = run_config(SPARSE, Layout(zero=stage, accumulation=2))
        engine, controller = build(mesh, config)
        # Its timer waits from the third step on.
        with patch.object(type(get_accelerator()), "synchronize") as synchronize:
            for step, batch in enumerate(make_batches(config)):
                train_step(mesh, engine, controller, step, batch)
        found[str(stage)] = synchronize.call_count
    return found


@cache
def results() -> dict[str, int]:
    return run_distributed(synchronisations, 1, timeout=300)[0]


def test_deepspeed_does_not_wait_for_the_device_to_take_times() -> None:
    assert results() == {"1": 0, "2": 0, "3": 0}
