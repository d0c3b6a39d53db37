"""Metrics, topology lines and pictures, and what a restart makes of them."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megasparse.monitoring.records import RunRecords
from megasparse.monitoring.tracked_run import TrackedRun
from megasparse.reporting.run_data import read_run
from megasparse.utils.files import describe_failure, sync_files


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


def test_files_of_the_user_are_left_alone_and_those_of_methods_are_not(tmp_path: Path) -> None:
    foreign = tmp_path / "answers.jsonl"
    foreign.write_text('{"prompt": "a"}\n{"step": 9, "score": 1}\nno line\n')
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    before = foreign.read_bytes()
    warnings: list[str] = []
    for start in (0, 2, 0):
        with RunRecords(tmp_path, resume_step=start, warn=warnings.append) as records:
            for step in range(start + 1, 5):
                records.metrics({"step": step, "loss": 1.0})
                records.record("spiel", {"step": step, "grown": start})
        sync_files(tmp_path, "*.jsonl")
        found = [(line["step"], line["grown"]) for line in lines(tmp_path / "spiel.jsonl")]
        assert found == [(step, 0) for step in range(1, start + 1)] + [(step, start) for step in range(start + 1, 5)]
    assert foreign.read_bytes() == before and not warnings


def test_lines_that_should_be_there_are_told(tmp_path: Path) -> None:
    counted: dict[str, int] = {}
    with RunRecords(tmp_path, resume_step=0, lines=counted) as records:
        for step in range(1, 6):
            records.metrics({"step": step, "loss": float(step)})
        records.record("topology", {"step": 4})
    assert counted == {"metrics": 5, "topology": 1}
    warnings: list[str] = []
    RunRecords(tmp_path, resume_step=5, lines=dict(counted), warn=warnings.append).close()
    assert not warnings
    first, *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(first + last)
    (tmp_path / "topology.jsonl").unlink()
    RunRecords(tmp_path, resume_step=5, lines=counted, warn=warnings.append).close()
    assert warnings == [
        f"{tmp_path / 'metrics.jsonl'}: 3 of 5 lines up to step 5 are missing",
        f"{tmp_path / 'topology.jsonl'}: 1 of 1 lines up to step 5 are missing",
    ]
    assert counted == {"metrics": 5, "topology": 1}, "they stay missing"


HALF, NO_UTF_8, NO_OBJECT, NO_STEP = b'{"step": 2, "lo', b'{"step": 2, "loss": "\xff\xfe"}', b"[1, 2]", b'{"loss": 2.0}'
NO_NUMBER, ZEROS = b'{"step": "2"}', bytes(40)


@pytest.mark.parametrize("name", ["metrics", "topology", "of_a_method"])
@pytest.mark.parametrize("damage", [HALF, NO_UTF_8, NO_OBJECT, NO_STEP, NO_NUMBER, ZEROS, b"[" * 100_000])
def test_a_damaged_line_is_named_and_neither_stops_a_restart_nor_stays(
    tmp_path: Path, name: str, damage: bytes
) -> None:
    good = [f'{{"step": {step}, "loss": {step}.0}}'.encode() for step in (1, 3, 9)]
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(b"\n".join([good[0], damage, good[1], good[2]]) + b"\n")
    (tmp_path / "records.json").write_text('["metrics", "of_a_method", "topology"]')
    warnings: list[str] = []
    RunRecords(tmp_path, resume_step=5, warn=warnings.append).close()
    assert path.read_bytes() == b"\n".join(good[:2]) + b"\n"
    assert warnings == [f"{path}: line 2 cannot be read, as after a power cut: removed"]
    assert list(TrackedRun(tmp_path, 5, {}).history()) == (
        [(1, {"loss": 1.0}), (3, {"loss": 3.0})] * (name == "metrics")
    )


@pytest.mark.parametrize("damage", [HALF, NO_OBJECT, NO_STEP, ZEROS])
def test_readers_name_a_damaged_line_too(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1.0}\n' + damage + b'\n{"step": 3, "loss": 3.0}\n')
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics] == [1, 3]
    assert "metrics.jsonl: line 2 cannot be read: left out." in run.remarks


def test_a_whole_line_without_its_end_is_kept_and_the_next_stands_below(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}')
    with RunRecords(tmp_path, resume_step=1) as records:
        records.metrics({"step": 2})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_log_that_is_gone_is_missed(tmp_path: Path, is_replaced: bool) -> None:
    with RunRecords(tmp_path, resume_step=0) as records:
        records.metrics({"step": 1})
        (tmp_path / "metrics.jsonl").unlink()
        if is_replaced:
            (tmp_path / "metrics.jsonl").touch()
        with pytest.raises(FileNotFoundError) as raised:
            records.metrics({"step": 2})
    reason = "was replaced by another file" if is_replaced else "was deleted"
    assert describe_failure(raised.value) == f"{tmp_path / 'metrics.jsonl'}: {reason} while the run wrote it"


def test_a_line_that_could_not_be_written_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def a_few_bytes_then_full(file: int, content: bytes) -> int:
        if len(content) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, content[:10])

    with RunRecords(tmp_path, resume_step=0) as records:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", a_few_bytes_then_full)
            with pytest.raises(OSError) as raised:
                records.metrics({"step": 1, "loss": 2.25})
        records.metrics({"step": 2})
    assert describe_failure(raised.value) == f"{tmp_path / 'metrics.jsonl'}: No space left on device"
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 2}]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with RunRecords(tmp_path, resume_step=0) as records:
            records.picture("head", torch.ones(2, 2, dtype=torch.bool), 1)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {mode}


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
