"""Gradients that are reduced during the backward pass: the same run, and edited only once all reductions are over."""

from __future__ import annotations

from functools import cache
from unittest.mock import Mock, patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from engine_runs import Layout, build, make_batches, run_cases, run_config
from harness import run_distributed

from megasparse.parallel import Mesh

COMMON = ["model.hidden_size=32", "sparsity.block_size=8", "train.steps=12", "sparsity.update_interval=2"]
# Buckets of 3,000 elements: several in a backward pass, and MLP matrices that are larger than one.
SETTING = "deepspeed.extra.zero_optimization={{overlap_comm: {}, reduce_bucket_size: 3000}}"
STAGES = (1, 2)


def runs(mesh: Mesh) -> dict[str, dict]:
    cases = [
        (f"stage {stage} {word}", [*COMMON, SETTING.format(word)], Layout(data=2, zero=stage, accumulation=2))
        for stage in STAGES
        for word in ("false", "true")
    ]
    return {"runs": run_cases(mesh, cases), "waits": {str(stage): waits(mesh, stage) for stage in (1, 2, 3)}}


def waits(mesh: Mesh, stage: int) -> list[int]:
    """After each backward pass of a step: how often the present stream was told to wait for the reductions'."""
    config = run_config(COMMON, Layout(data=2, zero=stage, accumulation=2))
    engine, _ = build(mesh, config)
    optimizer, present, counts = engine._engine.optimizer, Mock(), []
    name = "reduce_and_partition_stream" if stage == 3 else "reduction_stream"
    assert getattr(optimizer, name) is None, "a CPU has no streams"
    for batch in make_batches(config)[0][: 4 * 2].chunk(2):
        loss = engine.forward(batch[:2, :-1], batch[:2, 1:])
        setattr(optimizer, name, stream := object())
        with patch.object(type(get_accelerator()), "current_stream", lambda self, index=None: present):
            engine.backward(loss)
        setattr(optimizer, name, None)
        counts.append(sum(call.args == (stream,) for call in present.wait_stream.call_args_list))
    return counts


@cache
def results() -> dict[str, dict]:
    return run_distributed(runs, 2, timeout=300)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_overlap_changes_no_bit(stage) -> None:
    plain, overlapped = (results()["runs"][f"stage {stage} {word}"] for word in ("false", "true"))
    assert torch.equal(plain["losses"], overlapped["losses"]) and torch.equal(plain["norms"], overlapped["norms"])
    assert plain["digests"] == overlapped["digests"] and len(plain["digests"]) > 2
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, overlapped["weights"][name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_edits_come_after_the_reductions(stage) -> None:
    """The last backward pass of a step ends with the order to wait."""
    assert results()["waits"][str(stage)] == [0, 1]
