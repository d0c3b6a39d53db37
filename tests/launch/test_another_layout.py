"""A run on two ranks, tensor parallel and at ZeRO stage 3, that goes on as one process at stage 1, through the scripts.

What the run leaves can be sampled from as it is.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY, command, curve, run, write_corpus

STOP = 11
PROMPT = "12 + "
DIVIDED = ["parallel.tensor_parallel_size=2", "deepspeed.zero_stage=3"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def started(corpus, tmp_path_factory) -> Path:
    """The folder of a run that its two ranks have left after step 11."""
    folder = tmp_path_factory.mktemp("started")
    # Lines of metrics every two steps, so that a window is open when the run stops.
    settings = [f"train.stop_after={STOP}", "train.log_interval=2", f"train.sample_prompt='{PROMPT}'"]
    run(command(corpus, folder, "run.name=run", *settings, *DIVIDED))
    return folder / "run"


@pytest.fixture
def stopped(started, tmp_path) -> Path:
    """A copy of it."""
    shutil.copytree(started, tmp_path / "run")
    return tmp_path / "run"


def resume(corpus: Path, run_folder: Path, *overrides: str) -> list[str]:
    settings = ("run.name=run", "train.resume=auto", "train.log_interval=2", *overrides)
    return command(corpus, run_folder.parent, *settings, ranks=1)


def test_another_number_of_ranks_goes_on_with_the_same_curve(corpus, stopped, tmp_path) -> None:
    resumed = run(resume(corpus, stopped)).stdout
    assert f"going on from step {STOP}" in resumed
    run(command(corpus, tmp_path, "run.name=whole", "train.log_interval=2", ranks=1))
    expected, found = curve(tmp_path / "whole"), curve(stopped)
    assert len(found) == len(expected) == 12
    for theirs, mine in zip(expected, found, strict=True):
        # Validation and its loss are not in every line.
        assert [type(value) for value in mine] == [type(value) for value in theirs]
        for a, b in zip(mine, theirs, strict=True):
            assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b), f"step {theirs[0]}"


def test_a_changed_byte_is_refused_and_nothing_else_is_changed(corpus, stopped) -> None:
    (file,) = stopped.glob("checkpoints/*/rank-00001.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    refused = run(resume(corpus, stopped), expect=2).stdout
    assert "does not have its checksum" in refused and str(file) in refused and "no good checkpoint" in refused
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_another_model_is_refused(corpus, stopped) -> None:
    refused = run(resume(corpus, stopped, "model.num_layers=3"), expect=2).stdout
    assert "model.num_layers: 3, but the run to go on with has 2; must be 2" in refused


def test_one_process_samples_from_what_the_ranks_have_left(started) -> None:
    script = str(REPOSITORY / "launch" / "generate.py")
    words = ["--prompt", PROMPT, "--tokens", "10", "--device", "cpu"]
    output = run([sys.executable, script, "--run", str(started), *words]).stdout
    left = (started / "sample.txt").read_text()
    # Messages share the pipe; the script stops where a document ends, the run's sample goes on.
    text = output[output.index(PROMPT) :].removesuffix("\n")
    assert len(text) > len(PROMPT) and left.startswith(text)
