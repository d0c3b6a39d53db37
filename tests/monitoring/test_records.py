"""Metrics, topology lines and pictures, and what a restart makes of them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megasparse.monitoring.records import RunRecords


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_restart_removes_lines_of_steps_that_are_done_again(tmp_path: Path) -> None:
    first = RunRecords(tmp_path, resume_step=0)
    for step in range(1, 6):
        first.metrics({"step": step, "loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    second = RunRecords(tmp_path, resume_step=3)
    second.metrics({"step": 4, "loss": 40.0})
    second.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_a_picture_shows_the_mask_and_large_masks_are_averaged(tmp_path: Path) -> None:
    records = RunRecords(tmp_path, resume_step=0)
    mask = torch.rand(6, 9) < 0.5
    records.picture("layers.0.mlp.up", mask, 7)
    small = np.asarray(Image.open(tmp_path / "topology" / "layers.0.mlp.up" / "step-00000007.png"))
    assert np.array_equal(small, mask.numpy() * 255)
    large = torch.zeros(300, 130, dtype=torch.bool)
    large[:150] = True
    records.picture("head", large, 7)
    shrunk = np.asarray(Image.open(tmp_path / "topology" / "head" / "step-00000007.png"))
    assert shrunk.shape == (100, 65) and shrunk[:50].min() == 255 and shrunk[50:].max() == 0


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    records = RunRecords(tmp_path, resume_step=0)
    records.metrics({"step": 1, "grad_norm": math.inf, "loss": math.nan, "lr": -math.inf, "phase": "dense", "count": 2})
    records.record("topology", {"step": 1, "densities": {"head": math.nan, "up": 0.5}, "parts": [1.0, math.inf]})
    records.close()
    metrics, topology = (
        json.loads((tmp_path / f"{name}.jsonl").read_text(), parse_constant=refuse) for name in ("metrics", "topology")
    )
    assert metrics == {"step": 1, "grad_norm": None, "loss": None, "lr": None, "phase": "dense", "count": 2}
    assert topology == {"step": 1, "densities": {"head": None, "up": 0.5}, "parts": [1.0, None]}
