"""How often a training step makes the host wait for the device. A CPU never waits: calls are counted instead."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engine_runs import Layout, make_batches, run_config
from harness import run_distributed

from megasparse.parallel import Mesh
from megasparse.training.build_engine import build_engine
from megasparse.training.loop import Trainer
from megasparse.training.state import TrainState

SPARSE = ["train.steps=5", "sparsity.points=[[0,0.5],[1,0.5]]"]
READS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")
"""What a tensor is asked with for values that the device may not have computed yet."""

LAYOUTS = {
    f"stage {stage}, {precision}": (stage, precision)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    if stage or precision == "fp32"
}


@contextmanager
def reads(found: list[str]) -> Iterator[None]:
    """Each read of a tensor that is not within another one, with the place in the code."""

    def counting(name: str):
        original = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            if not depth:
                place = next(f for f in reversed(traceback.extract_stack()[:-1]) if "/torch/" not in f.filename)
                found.append(f"{name} in {place.filename.rpartition('/')[2]}: {place.name}")
            depth.append(name)
            try:
                return original(tensor, *args, **kwargs)
            finally:
                depth.pop()

        return read

    depth: list[str] = []
    with ExitStack() as patches:
        for name in READS:
            patches.enter_context(patch.object(torch.Tensor, name, counting(name)))
        yield


def waits(mesh: Mesh) -> dict[str, dict]:
    """By layout: how often DeepSpeed waited for everything that the device has to do, over all steps, and the reads of
    each step."""
    found = {}
    for name, (stage, precision) in LAYOUTS.items():
        # The kernel for CPUs has no device to wait for.
        fixed = ["sparsity.update_interval=100", "kernels.optimizer=torch"]
        overrides = [*SPARSE, f"train.precision={precision}", *fixed]
        config = run_config(overrides, Layout(zero=stage, accumulation=2))
        methods, engine = build_engine(config, config.model.vocab_size, mesh)
        samples = torch.cat(make_batches(config)).numpy()
        trainer = Trainer(config, mesh, engine, methods, samples, TrainState())
        by_step: list[list[str]] = []
        with trainer.loader() as loader, patch.object(type(get_accelerator()), "synchronize") as synchronize:
            for _ in range(config.train.steps):
                by_step.append([])
                with reads(by_step[-1]):
                    trainer.train_step(loader)
        # In the first step ranks compare in what order stage 3 uses weights; after the last one the masks are drawn.
        found[name] = {"synchronize": synchronize.call_count, "reads": by_step[1:-1]}
    return found


@cache
def results() -> dict[str, dict]:
    return run_distributed(waits, 1, timeout=300)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_deepspeed_does_not_wait_for_the_device_to_take_times(name) -> None:
    assert results()[name]["synchronize"] == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_reads_from_the_device_once(name) -> None:
    for read in results()[name]["reads"]:
        assert read == ["tolist in training_engine.py: gradient_norm_and"]
