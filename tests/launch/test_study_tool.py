"""tools/study.py with the real entry script: a dry run, and two arms trained, stopped once and gone on with."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import runs
import yaml
from tool_calls import call

from megasparse.config.loader import load_config
from megasparse.training.plan import make_plan

SETTINGS = dict(setting.split("=") for setting in runs.TINY)


def write_study(folder):
    corpus = runs.write_corpus(folder)
    settings = {name: yaml.safe_load(value) for name, value in SETTINGS.items()}
    settings |= {"data.train": [{"path": str(corpus)}], "optimizer.lr": 5e-3, "train.steps": 60}
    study = {
        "name": "two",
        "folder": str(folder / "studies"),
        "settings": settings,
        "budget": {"share": 0.5, "of": "dense"},
        "seeds": [3],
        "processes": 2,
        "baselines": ["dense"],
        "arms": [
            {"name": "dense", "solve": "none", "settings": {"sparsity.algorithm": "dense"}},
            {"name": "mst"},
        ],
    }
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


def test_a_dry_run_says_what_every_arm_costs_and_starts_nothing(tmp_path) -> None:
    status, output = call("study", "--study", write_study(tmp_path), "--dry-run")
    assert status == 0, output
    assert "2 runs at a time" in output and "time in all:" in output and "unknown" not in output
    dense, mst = (next(line for line in output.splitlines() if f"│ {name} " in line) for name in ("dense", "mst"))
    assert "200 %" in dense and " 60 " in dense and ("100 %" in mst or "99." in mst or "100." in mst)
    assert not (tmp_path / "studies").exists()


def test_mistakes_end_with_one_line(tmp_path) -> None:
    status, output = call("study", "--study", tmp_path / "none.yaml")
    assert status == 2 and output.startswith("study: error: --study: no such file") and "Traceback" not in output


@pytest.mark.exhaustive
def test_a_real_study_is_stopped_and_goes_on(tmp_path) -> None:
    file, place = write_study(tmp_path), tmp_path / "studies" / "two"
    command = [sys.executable, runs.REPOSITORY / "tools" / "study.py", "--study", file]
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY), "COLUMNS": "200"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": runs.REPOSITORY}
    with processes.Process(command, environment, **streams) as study:
        runs.wait_for_steps(study, place / "runs" / "dense_lr0.005_seed3", 3)
        study.send_signal(signal.SIGTERM)
        output, _ = study.communicate(timeout=processes.LIMIT_SECONDS)
        assert study.returncode == 143 and not study.left(), output
    with processes.Process(command, environment, **streams) as study:
        output, _ = study.communicate(timeout=processes.LIMIT_SECONDS)
    assert study.returncode == 0, output
    results = json.loads((place / "results.json").read_text())
    dense, mst = results["arms"]
    assert dense["n"] == mst["n"] == 1 and results["differences"][0]["arm"] == "mst"
    for arm in (dense, mst):
        (folder,) = (place / "runs").glob(f"{arm['arm']}_*")
        # What the run has counted is what was planned, and no step was made twice or left out.
        planned = make_plan(load_config([folder / "config.yaml"]), 1)["flops"]["algorithmic"]
        assert arm["flops"] == planned == pytest.approx(arm["runs"][0]["flops"], rel=0.01)
        assert [line["step"] for line in runs.metrics(folder)] == list(range(1, arm["steps"] + 1))
    assert mst["flops"] == pytest.approx(0.5 * dense["flops"], rel=0.01)
    assert (place / "study.html").is_file() and "Paired differences" in output


def test_data_of_the_quickstart_is_made_with_the_python_of_the_tool(tmp_path) -> None:
    """Also where its environment was not activated, and another `python` comes first, or none at all."""
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    with_own_python = runpy.run_path(str(runs.REPOSITORY / "tools" / "study.py"))["with_own_python"]
    for path in (str(tmp_path), ""):
        variables = with_own_python({"PATH": path, "LANG": "C"})
        found = shutil.which("python", path=variables["PATH"])
        assert found is not None and Path(found).parent == Path(sys.executable).parent and variables["LANG"] == "C"
